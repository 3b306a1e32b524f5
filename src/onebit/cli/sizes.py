"""Amounts of memory, as a user writes them."""

import re

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(option: str, text: str) -> int:
    """Bytes of "2GiB", "500M" or "1000000"; units are powers of 1024.

    Raises:
        ValueError: no such text; the message names the option.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise ValueError(f"{option} is {text!r}; expected a size such as 2GiB or 500M")
    return int(float(found[1]) * _UNITS[found[2].upper()])
