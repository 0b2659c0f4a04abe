"""What two stages must agree on: records, vokens, recall, run folders, logging; and the small data commands."""
