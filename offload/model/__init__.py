"""The user's model: its partitions, the hooks on its modules, deferred construction, what can be refused about it."""
