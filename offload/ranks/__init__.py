"""The ranks of a session: what they do together, and who of them is still there."""
