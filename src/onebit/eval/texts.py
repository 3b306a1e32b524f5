"""Perplexity and bits per byte of a text, in windows that are said.

windows = Windows.of(llm, window=512, stride=256)
perplexity(Scorer(llm), read_text("wiki.test.raw.xz"), windows)
"""

import bz2
import gzip
import lzma
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onebit.engine.model import Float32, Int32
from onebit.eval.figures import Figure, Float64, token_mean
from onebit.eval.scoring import Scorer, log_sums

if TYPE_CHECKING:
    from onebit.llm import LLM

OPENERS: dict[str, Callable[[Path], Any]] = {".xz": lzma.open, ".bz2": bz2.open, ".gz": gzip.open}
WINDOW = 512
BOS = ("auto", "always", "never")
# Tokens of windows that are asked for at once, between two reports of progress.
TOKENS_AT_ONCE = 4096


class Window(NamedTuple):
    """A piece of a text that the model reads by itself.

    Args:
        ids: int32 [T], its tokens.
        first: the first token that is predicted, at least 1.
    """

    ids: Int32
    first: int


@dataclass(frozen=True)
class Windows:
    """How a text is cut into windows, and which of their tokens count.

    Window i begins at token i * stride. Its tokens count where no earlier window has counted them; the others are
    context.

    Args:
        window: tokens of a window, the begin-of-text token included.
        stride: tokens from one window to the next.
        bos: id that every window begins with; None puts none there, and the first token of all is not predicted.
        halves: as llama.cpp's perplexity has it: windows follow each other, the first half of each is only context,
            bos takes the place of its first token, and what does not fill a window is left out.

    Raises:
        ValueError: a window or stride that is too small or too large.
    """

    window: int
    stride: int
    bos: int | None
    halves: bool = False

    def __post_init__(self) -> None:
        if self.window < 4:
            raise ValueError(f"window is {self.window}; expected at least 4 tokens")
        most = self.window if self.halves or self.bos is None else self.window - 1
        if not 1 <= self.stride <= most:
            raise ValueError(
                f"stride is {self.stride}; expected 1 to {most} for a window of {self.window}: a longer one would "
                "skip tokens"
            )

    @classmethod
    def of(
        cls,
        llm: "LLM",
        window: int | None = None,
        stride: int | None = None,
        bos: str = "auto",
        halves: bool = False,
    ) -> "Windows":
        """The windows for a model.

        Args:
            llm: the model that reads them.
            window: tokens of a window; None takes WINDOW, or the context where that is shorter.
            stride: None takes half a window, or with halves a whole one.
            bos: "auto" begins windows as the tokenizer begins texts, "always" with the begin- or else the
                end-of-text token, "never" with none.
            halves: see Windows.

        Raises:
            ValueError: a window longer than the context, an unknown bos, a stride with halves.
        """
        config = llm.config
        window = min(WINDOW, config.max_seq_len) if window is None else window
        if window > config.max_seq_len:
            raise ValueError(f"window is {window}; the context of this model holds {config.max_seq_len}")
        if bos not in BOS:
            raise ValueError(f"bos is {bos!r}; expected {', '.join(BOS)}")
        if halves and stride not in (None, window):
            raise ValueError("windows like those of llama.cpp follow each other; leave the stride out")
        token = config.bos_token
        if bos == "never":
            token = None
        elif bos == "always" and token is None:
            token = next(iter(config.eos_tokens), None)
            if token is None:
                raise ValueError("bos is 'always'; this model has no token to begin a text with")
        return cls(window, stride or (window if halves else max(window // 2, 1)), token, halves)

    def cut(self, tokens: list[int]) -> list[Window]:
        """Cut a text.

        Args:
            tokens: of the text, without begin-of-text token.

        Raises:
            ValueError: a text with no token to predict.
        """
        start_of_all = [] if self.bos is None else [self.bos]
        windows = []
        if self.halves:
            # The text begins as the tokenizer has it; then every window does.
            tokens = [*start_of_all, *tokens]
            for begin in range(0, len(tokens) - self.window + 1, self.window):
                ids = np.array(tokens[begin : begin + self.window], np.int32)
                ids[: len(start_of_all)] = start_of_all
                windows.append(Window(ids, self.window // 2 + 1))
            if not windows:
                raise ValueError(
                    f"the text has {len(tokens)} tokens; a window takes {self.window}: choose a shorter one"
                )
            return windows
        room, counted, begin = self.window - len(start_of_all), 0, 0
        while counted < len(tokens):
            ids = np.array([*start_of_all, *tokens[begin : begin + room]], np.int32)
            first = max(len(start_of_all) + counted - begin, 1)
            if first < len(ids):
                windows.append(Window(ids, first))
            counted, begin = begin + room, begin + self.stride
        if not windows:
            raise ValueError("the text has no token to predict; give a longer one")
        return windows


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Args:
        perplexity: exp of the mean negative log-probability of a token.
        bits_per_byte: bits to write a byte of the text: -log2(probability) per token times tokens per byte.
        nll: float64 [n], negative log-probability of each token that counts, in nats, in the order of the text.
        n_tokens: tokens of the text.
        n_bytes: bytes of the text.
        n_windows: windows that it was read in.
    """

    perplexity: Figure
    bits_per_byte: Figure
    nll: Float64
    n_tokens: int
    n_bytes: int
    n_windows: int


def read_text(path: Path) -> str:
    """Read a text, plain or compressed (.xz, .bz2, .gz).

    Raises:
        ValueError: a file that is damaged, incomplete, or no UTF-8.
        OSError: no such file.
    """
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            data: bytes = file.read()
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged or not fully downloaded ({error}); fetch it again") from None
    except OSError as error:
        if error.errno is not None:
            raise
        # What bz2 raises for bytes that are none of its own.
        raise ValueError(f"{path}: damaged or not fully downloaded ({error}); fetch it again") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is no UTF-8; expected a text in UTF-8") from None


def tokens_of(llm: "LLM", text: str, limit: int | None = None) -> tuple[list[int], int]:
    """The tokens of a text, or the first so many of them, and the bytes that they stand for."""
    tokens = llm.tokenizer.encode(text, begin=False)
    if limit is None or limit >= len(tokens):
        return tokens, len(text.encode())
    return tokens[:limit], len(llm.tokenizer.decode(tokens[:limit]).encode())


def perplexity(
    scorer: Scorer,
    text: str,
    windows: Windows,
    limit: int | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Perplexity:
    """Measure how well a model predicts a text.

        perplexity = exp(mean(nll))        bits per byte = mean(nll) / ln(2) * tokens / bytes

    Args:
        scorer: of the model.
        text: any text.
        windows: how it is cut.
        limit: read only so many of its first tokens.
        progress: called with the share that is done.

    Raises:
        ValueError: a text without a token to predict.
    """
    tokens, n_bytes = tokens_of(scorer.llm, text, limit)
    cut = windows.cut(tokens)
    nll: list[Float64] = []
    for begin, part in batches(cut):
        scores = scorer.score([(w.ids[: w.first].tolist(), w.ids[w.first :].tolist()) for w in part])
        nll += [-score.log_probabilities for score in scores]
        progress((begin + len(part)) / len(cut))
    return figures(np.concatenate(nll), len(tokens), n_bytes, len(cut))


def predictions(
    scorer: Scorer,
    tokens: list[int],
    windows: Windows,
    progress: Callable[[float], None] = lambda share: None,
) -> Iterator[tuple[npt.NDArray[np.int64], Float32, Int32, Float64]]:
    """What a model says before each token that counts, some of them at a time and in any order.

    Args:
        scorer: of the model.
        tokens: of a text.
        windows: how it is cut.
        progress: called with the share that is done.

    Yields:
        Places of the tokens among those that count, int64 [R]; the logits that predict them, float32 [R, V],
        overwritten by the next ones; the tokens themselves, int32 [R]; and log(sum(exp(logits))), float64 [R].
    """
    cut = windows.cut(tokens)
    places = np.cumsum([0, *(len(w.ids) - w.first for w in cut)])
    for begin, part in batches(cut):
        for i, row, logits_RV in scorer.logits([w.ids[:-1] for w in part], [w.first - 1 for w in part]):
            ids, first = part[i]
            at: Any = places[begin + i] + row + 1 - first + np.arange(len(logits_RV))
            yield at, logits_RV, ids[row + 1 : row + 1 + len(logits_RV)], log_sums(logits_RV)
        progress((begin + len(part)) / len(cut))


def batches(windows: list[Window]) -> Iterator[tuple[int, list[Window]]]:
    """Some windows at a time, and the index of their first."""
    n = max(1, TOKENS_AT_ONCE // len(windows[0].ids))
    for begin in range(0, len(windows), n):
        yield begin, windows[begin : begin + n]


def figures(nll: Float64, n_tokens: int, n_bytes: int, n_windows: int) -> Perplexity:
    """Perplexity and bits per byte of the negative log-probabilities of tokens."""
    per_token = token_mean(nll)
    bits = per_token.through(lambda nats: nats / math.log(2) * n_tokens / n_bytes)
    return Perplexity(per_token.through(exp), bits, nll, n_tokens, n_bytes, n_windows)


def exp(x: float) -> float:
    """e^x, infinite where it is too large for a number."""
    return math.exp(x) if x < 700 else math.inf
