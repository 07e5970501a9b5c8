"""Weights that stay on disk: where their bytes are, how they are packed, and how they get to the data file."""
