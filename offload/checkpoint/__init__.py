"""Saving and loading a session: the state of training as checkpoints know it."""
