"""Homes of chunks, the memory and files they lie in, and values read from and written to them."""
