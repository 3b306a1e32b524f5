"""Numbers, texts and bytes that a reader may not expect. Knows no formats."""

import ast
import re
import struct
from functools import cache
from pathlib import Path
from random import Random

import onebit.formats

FORMATS = Path(onebit.formats.__file__).parent
# Far beyond what a seed takes: what a change makes larger than this is cut.
MAX_DATA = 1 << 15

# What comes of taking apart a file that was damaged before.
UNREADABLE = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error, RecursionError, MemoryError,
)  # fmt: skip
INTS = (0, 1, 2, 3, 4, 7, 8, 16, 31, 64, 255, 256, 2**15, 2**24 - 1, 2**24, 2**31 - 1, 2**31, 2**32, 2**53, 2**62,
         2**63 - 1, 2**63, 2**64 - 1, 10**30, 10**400)  # fmt: skip
FLOATS = (0.0, -0.0, 0.5, 1.0, 1.0000001, -1.5, 3.0, 1e-45, 1e-300, 65504.0, 1e30, 3.4e38, 1e308)
TEXTS = ("", " ", "a", "ab", "\n", "a\nb", "\x00", "\x1b[2J", "\u2028", "\u202e", "\u00e9", "\u2581", "\ud800",
          "\U0001f600", "%s{}", "../x", "x" * 700, "0", "-1", "1e5", "NaN")  # fmt: skip


@cache
def words() -> tuple[str, ...]:
    """The names that the readers look for: all words in their sources."""
    found: set[str] = set()
    for path in [*sorted(FORMATS.glob("**/*.py")), FORMATS.parent / "config.py"]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 48:
                if re.fullmatch(r"[\w.<>|/-]+", node.value):
                    found.add(node.value)
    return tuple(sorted(found))


def some_bytes(data: bytes, random: Random) -> bytes:
    """Bytes that are flipped, put in, taken out, doubled, or become a number that is at an edge."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        at, n = random.randrange(len(changed) + 1), random.choice((1, 1, 2, 4, 8, 64))
        match random.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << random.randrange(8)
            case 1 if at < len(changed):
                changed[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF, 10, random.randrange(256)))
            case 2:
                del changed[at : at + n]
            case 3:
                changed[at:at] = random.randbytes(n)
            case 4:
                changed[at:at] = changed[at : at + n]
            case 5:
                number = random.choice(INTS) * random.choice((1, 1, -1)) % 2 ** (8 * n)
                changed[at : at + n] = number.to_bytes(n, "little")
    return bytes(changed)


def bytes_of(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def fill(data: bytes, n: int) -> bytes:
    """Data that is cut, or repeated, to n bytes."""
    return (data or b"\0").ljust(n, b"\0")[:n]


def some_values(data: bytes, random: Random) -> bytes:
    """Tensor data with some odd numbers in it."""
    if random.random() < 0.3:
        return some_bytes(data, random)[: len(data)].ljust(len(data), b"\0")
    changed, width = bytearray(data), random.choice((1, 2, 2, 4, 4))
    odd = {
        1: (0, 1, 2, 3, 0x55, 0xAA, 0x80, 0xFF),
        2: (0, 1, 0x3C00, 0x7BFF, 0x7C00, 0x7E00, 0x8000, 0xBC00, 0xFC00, 0x3F80, 0x7F7F, 0x7F80, 0x7FC0),
        4: (
            0,
            1,
            0x3F800000,
            0xBF800000,
            0x7F7FFFFF,
            0x7F800000,
            0x7FC00000,
            0x80000000,
            0x00800000,
            0x477FE000,
        ),
    }[width]
    number = random.choice(odd).to_bytes(width, "little")
    n = len(data) // width
    for at in (
        range(n) if random.random() < 0.15 else random.choices(range(max(n, 1)), k=random.choice((1, 3)))
    ):
        changed[at * width : (at + 1) * width] = number
    return bytes(changed[: len(data)])
