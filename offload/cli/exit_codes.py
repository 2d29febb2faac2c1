"""The exit codes of the command `offload`; 0 is done."""

from typing import Final

FAILED: Final = 1
"""Something failed while it ran."""
UNUSABLE: Final = 2
"""An argument cannot be used; nothing ran."""
INTERRUPTED: Final = 130
"""Ctrl-C ended it: 128 and the number of SIGINT."""
