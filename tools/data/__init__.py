"""Readers of captions in the forms people have them; `tools.prepare_captions` is their command."""
