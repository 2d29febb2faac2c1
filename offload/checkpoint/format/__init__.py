"""Checkpoints on disk: saved and loaded chunk by chunk, at any number of ranks; nothing is pickled."""
