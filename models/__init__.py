"""Everything that learns: modules with their configuration, saving and loading. Knows no stage and no path."""
