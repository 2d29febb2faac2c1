"""Numbers as options of commands take them: converters for argparse."""

import argparse


def at_least_one(text: str) -> int:
    """Whole numbers from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1.")
    return int(text)


def not_negative(text: str) -> int:
    """Whole numbers from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0.")
    return int(text)
