"""Guessing the next tokens from the text itself, and whether a guess is worth computing.

A text that quotes, lists or repeats says again what it said before. Guesses never change a text: the engine
draws every token itself, and a guess that was right only saves a step. Knows no model and no clock.

    lookup = Lookup(tokens)                        # of one text, whose list grows
    speculation = Speculation()                    # of one model, for all its texts
    lookup.read()
    (drafts,) = speculation.draft([(lookup, 8)], n_rows=1)
    speculation.observe(n_rows=1 + len(drafts), seconds=0.02)
"""

from collections.abc import Sequence

# Earlier occurrences of the last two tokens that are compared.
CANDIDATES = 4
# Matches of this length and longer are counted together.
LONGEST = 8
# Most guesses for one text in one step: with the token before them they fill a tile of 16 rows.
MAX_DRAFTS = 15
# How fast old observations fade: a text changes its character within some 20 guesses, costs within 50 steps.
TEXT_RATE = 0.05
COST_RATE = 0.02
# Price of a row until it is measured, and how strongly it is believed against measurements (in squared rows).
FIRST_PRICE = 0.25
FIRST_WEIGHT = 0.02
# What a guess costs beside its row, in prices of a row: drawing and reading what it says.
MARGIN = 1.15
# A step that took longer than this multiple of what was expected was disturbed.
DISTURBED = 3.0
# Looking for guesses takes about so many seconds, and may take this part of the time.
LOOK_SECONDS = 1e-5
LOOK_SHARE = 0.01


class Lookup:
    """What followed the latest tokens of a text when they came before, and how often that was right.

    A match is followed for as long as it predicts the text. Then the places where the last two tokens occur are
    compared, the latest CANDIDATES of them, and the one that shares most tokens with the end of the text is the next
    match. Each token costs the same, however long the text.

    Args:
        tokens: of the text; the list may grow, and is read up to its end by every call.
    """

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        # Index after the latest occurrence of each bigram, and for each token that of the one before.
        self._after: dict[int, int] = {}
        self._before: list[int] = []
        # The token that a match predicts, 0 for none, and the length of that match.
        self._source = 0
        self._length = 0
        # Chance that the next token is the one predicted, by length of the match.
        self._chances = [n / (n + 5) for n in range(LONGEST + 1)]

    def read(self) -> bool:
        """Take in the tokens that are new; says whether there is something to guess."""
        tokens, after, before, source = self._tokens, self._after, self._before, self._source
        n_read = len(before)
        # No bigram with the first token, whatever comes before it, is a negative number.
        last = tokens[n_read - 1] if n_read else -1
        for i in range(n_read, len(tokens)):
            token = tokens[i]
            if source:
                n, chances = self._length, self._chances
                if tokens[source] == token:
                    chances[n] += TEXT_RATE * (1.0 - chances[n])
                    source += 1
                    self._length = min(n + 1, LONGEST)
                else:
                    chances[n] -= TEXT_RATE * chances[n]
                    source = 0
            bigram = last << 32 | token
            before.append(after.get(bigram, 0))
            after[bigram] = i + 1
            last = token
        self._source = source or self._find()
        return self._source > 0

    def _find(self) -> int:
        """The token after the longest match, of these the latest; 0 if there is none."""
        tokens, before = self._tokens, self._before
        best = self._length = 0
        i = len(tokens) - 1
        source = before[i]
        for _ in range(CANDIDATES):
            if not source or self._length == LONGEST:
                break
            n = 2
            while n < LONGEST and n < source and tokens[source - 1 - n] == tokens[i - n]:
                n += 1
            if n > self._length:
                best, self._length = source, n
            source = before[source - 1]
        return best

    def chance(self, i: int) -> float:
        """Chance that guess i is right, where those before it are; 0 where there is no guess."""
        return self._chances[min(self._length + i, LONGEST)] if self._source else 0.0

    def guesses(self, n: int) -> list[int]:
        """The first n guesses, if there are any; what repeats up to the end of the text is expected to go on."""
        guesses = self._tokens[self._source : self._source + n] if self._source else []
        while 0 < len(guesses) < n:
            guesses += guesses
        return guesses[:n]


class Speculation:
    """Which guesses are worth a row of the next step.

    A step of n rows takes time in proportion to 1 + price * (n - 1); the price is fitted to the steps observed.
    A guess is drafted while the tokens per second expected from the step rise with it: while

        chance of its acceptance / (MARGIN * price)  >  tokens expected without it / time without it.
    """

    def __init__(self) -> None:
        # Exponentially weighted means and moments of rows and seconds.
        self._n_steps = 0
        self._rows = 1.0
        self._seconds = 0.0
        self._variance = 0.0
        self._covariance = 0.0

    def observe(self, n_rows: int, seconds: float) -> None:
        """Learn from a step what a row costs."""
        if self._n_steps:
            expected = self._seconds + self._slope() * (n_rows - self._rows)
            seconds = min(seconds, DISTURBED * max(expected, self._seconds))
        self._n_steps += 1
        rate = max(COST_RATE, 1 / self._n_steps)
        more_rows, more_seconds = n_rows - self._rows, seconds - self._seconds
        if self._n_steps == 1:
            more_rows, more_seconds = 0.0, 0.0
            self._rows, self._seconds = float(n_rows), seconds
        self._rows += rate * more_rows
        self._seconds += rate * more_seconds
        self._variance = (1 - rate) * (self._variance + rate * more_rows * more_rows)
        self._covariance = (1 - rate) * (self._covariance + rate * more_rows * more_seconds)

    @property
    def pause(self) -> int:
        """Steps from a look that found nothing to draft to the next: looking takes Python some time."""
        return 1 + int(LOOK_SECONDS / (LOOK_SHARE * self._seconds)) if self._seconds else 1

    def price(self, n_rows: int) -> float:
        """What one more row costs, as a fraction of a step of n_rows."""
        if not self._n_steps:
            return FIRST_PRICE / (1 + FIRST_PRICE * (n_rows - 1))
        slope = self._slope()
        seconds = self._seconds + slope * (n_rows - self._rows)
        return slope / seconds if seconds > slope else 1.0

    def _slope(self) -> float:
        first = self._seconds * FIRST_PRICE / (1 + FIRST_PRICE * (self._rows - 1))
        return max((self._covariance + FIRST_WEIGHT * first) / (self._variance + FIRST_WEIGHT), 0.0)

    def draft(self, texts: Sequence[tuple[Lookup, int]], n_rows: int) -> list[list[int]]:
        """Guesses for some of the texts of the next step.

        Args:
            texts: each with the most guesses that it can use; all its tokens are read.
            n_rows: of the step without guesses: one token of each of its texts.
        """
        price = MARGIN * self.price(n_rows)
        tokens, time = float(n_rows), 1.0
        drafts = []
        for lookup, most in texts:
            n, all_right = 0, 1.0
            while n < min(most, MAX_DRAFTS):
                all_right *= lookup.chance(n)
                if all_right * time <= price * tokens:
                    break
                tokens += all_right
                time += price
                n += 1
            drafts.append(lookup.guesses(n))
        return drafts
