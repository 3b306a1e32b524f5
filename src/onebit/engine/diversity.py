"""How much a text repeats itself, by its tokens and by its words.

repetition(generation.generated)        # 0.03
distinct(generation.text)               # 0.61
"""

from collections.abc import Sequence

# Fewer tokens say nothing, and the last ones of a long text say it all.
LEAST_TOKENS = 16
MOST_TOKENS = 1024


def repetition(tokens: Sequence[int]) -> float | None:
    """Share of 3-grams that were there before, of the last 1,024 tokens; None for fewer than 16.

        1 - distinct 3-grams / 3-grams

    Args:
        tokens: generated ones.
    """
    last = tokens[-MOST_TOKENS:]
    if len(last) < LEAST_TOKENS:
        return None
    return 1 - len(set(zip(last, last[1:], last[2:], strict=False))) / (len(last) - 2)


def distinct(text: str) -> float | None:
    """Share of words that are the first of their kind, in lower case and without marks around them; None for none.

        distinct words / words                  falls with length: compare texts of about the same

    Args:
        text: a generated text.
    """
    words = [word for part in text.lower().split() if (word := part.strip(".,;:!?\"'()[]"))]
    return len(set(words)) / len(words) if words else None
