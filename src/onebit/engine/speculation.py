"""Guessing the next tokens from the text itself, and whether a guess is worth computing.

A text that quotes, lists or repeats says again what it said before. Guesses never change a text: the engine
draws every token itself, and a guess that was right only saves a step. Knows no model and no clock.

    lookup = Lookup(tokens)                        # of one text, whose list grows
    speculation = Speculation()                    # of one model, for all its texts
    (drafts,) = speculation.draft([(lookup, 8)])
    speculation.observe(n_rows=1 + len(drafts), seconds=0.02)
"""

from collections.abc import Sequence

# Lengths of the tokens that are looked up, longest first. With 3 as well the acceptance is the same.
NGRAMS = (4, 2)
# Matches of this length and longer are counted together.
LONGEST = 8
# Most guesses for one text in one step: with the token before them they fill a tile of 16 rows.
MAX_DRAFTS = 15
# How fast old observations fade: a text changes its character within some 20 guesses, costs within 50 steps.
TEXT_RATE = 0.05
COST_RATE = 0.02
# Price of a row until it is measured, and how strongly it is believed against measurements (in squared rows).
FIRST_PRICE = 0.4
FIRST_WEIGHT = 0.02
# A step that took longer than this multiple of what was expected was disturbed.
DISTURBED = 3.0


class Lookup:
    """What followed the latest tokens of a text when they came before, and how often that was right.

    A match is followed for as long as it predicts the text; then the last NGRAMS tokens are looked up, and the
    latest place where they occur is the next match. Each token costs the same, however long the text.

    Args:
        tokens: of the text; the list may grow, and is read up to its end by every call.
    """

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._n_read = 0
        # Index after the latest occurrence of each n-gram, packed into one number.
        self._after4: dict[int, int] = {}
        self._after2: dict[int, int] = {}
        # The last bigram and the one before it; negative numbers match nothing.
        self._bigram = self._earlier = -1
        self._last = -1
        # The token that a match predicts, 0 for none, and the length of that match.
        self._source = 0
        self._length = 0
        # Chance that the next token is the one predicted, by length of the match.
        self._chances = [n / (n + 3) for n in range(LONGEST + 1)]

    def read(self) -> None:
        """Take in the tokens that are new."""
        tokens, chances = self._tokens, self._chances
        for i in range(self._n_read, len(tokens)):
            token = tokens[i]
            if self._source:
                n = self._length
                if tokens[self._source] == token:
                    chances[n] += TEXT_RATE * (1.0 - chances[n])
                    self._source += 1
                    self._length = min(n + 1, LONGEST)
                else:
                    chances[n] -= TEXT_RATE * chances[n]
                    self._source = 0
            bigram = self._last << 32 | token
            fourgram = self._earlier << 64 | bigram
            if not self._source:
                self._find(i, bigram, fourgram)
            self._after4[fourgram] = self._after2[bigram] = i + 1
            self._earlier, self._bigram, self._last = self._bigram, bigram, token
        self._n_read = len(tokens)

    def _find(self, i: int, bigram: int, fourgram: int) -> None:
        source, length = self._after4.get(fourgram, 0), NGRAMS[0]
        if not source:
            source, length = self._after2.get(bigram, 0), NGRAMS[1]
        if source:
            tokens = self._tokens
            while length < min(LONGEST, source) and tokens[source - 1 - length] == tokens[i - length]:
                length += 1
            self._source, self._length = source, length

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

        chance of its acceptance / price of its row  >  tokens expected without it / time without it.
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

    def draft(self, texts: Sequence[tuple[Lookup, int]]) -> list[list[int]]:
        """Guesses for texts that each have one token to compute in the next step.

        Args:
            texts: each with the most guesses that it can use.
        """
        price = self.price(len(texts)) if texts else 0.0
        tokens, time = float(len(texts)), 1.0
        drafts = []
        for lookup, most in texts:
            lookup.read()
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
