"""Threads and time: futures, in-order lanes, the timeline, and what happens at a fork."""
