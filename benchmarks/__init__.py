"""What measures this library against this machine and against others. Part of a checkout, not of the wheel."""
