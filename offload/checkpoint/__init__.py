"""Checkpoints: saved and loaded piece by piece, at any number of ranks; nothing is pickled."""
