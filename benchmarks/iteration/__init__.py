"""Whole training iterations beside plain torch; run as `python -m benchmarks.iteration`."""
