"""Planning: what the machine has, and where each chunk is stored."""
