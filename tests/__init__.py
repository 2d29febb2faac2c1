"""Tests, one folder for each area. A regular package, so that no installed `tests` can shadow it."""
