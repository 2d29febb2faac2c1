"""Weights: their homes, their slots on the device, and the fetches between."""
