"""Placement: what the machine has, and where everything is at home."""
