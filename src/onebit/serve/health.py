"""Whether a model is well: what do its layers see, are its weights intact.

None of it reads a text. Of what layers see, the engine counts codes, and `CacheLook` reads a block of keys and values
now and then. A thread hashes the weights in memory, a little at a time.

    kv_entropy(engine.read_block(0, 0))     # (7.4, 7.6)
    check = WeightCheck(checkpoint, on_pass=print)
    check.start()
    check.close()
"""

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from onebit.checkpoint import Checkpoint, arrays
from onebit.engine.engine import Engine
from onebit.engine.model import Float32
from onebit.packing import UInt16
from onebit.quant import quantize_a8

# One step in so many has a row of all logits, for the entropy, and its codes counted.
PROBE_EVERY = 100
# Seconds from a look at the cache to the next, each at one layer.
LOOK_S = 1.0
# Hashed at a time: short enough to hold up no step for long.
PIECE_BYTES = 2**18
# Rest for each second of hashing: a quarter of a percent of one core.
REST = 400
# From one pass to the next, for small models.
PERIOD_S = 600


def kv_entropy(block: Float32) -> tuple[float, float]:
    """Entropy of the codes that an int8 cache holds of these keys, and of these values, in bits.

        H = -sum_c p(c) log2 p(c),    p(c) the share of code c in quantize_a8(x) of all vectors x

    Codes, because they mean the same for all formats of the cache and depend on no scale: what counts is how far the
    numbers of a vector differ. Vectors of equal numbers have 0 bits, and one number beside which all others vanish
    leaves nearly none; normally distributed numbers have about 7.5, and 8 is the most. What is no number counts as 0.

    Args:
        block: float32 [2, kv heads, positions, d_head], keys and values; see `Engine.read_block`.
    """
    keys, values = (_code_entropy(vectors) for vectors in block)
    return keys, values


def _code_entropy(vectors: Float32) -> float:
    with np.errstate(invalid="ignore"):
        codes = np.nan_to_num(quantize_a8(vectors)[0]).astype(np.int16)
    counts = np.bincount(codes.ravel() + 128, minlength=256)
    p = counts[counts > 0] / codes.size
    return max(float(-(p * np.log2(p)).sum()), 0.0)


class CacheLook:
    """Reads one block of an engine's cache a second, of each layer in turn, and tells the entropy of what it holds.

    Args:
        engine: whose thread calls.
        tell: called with the layer and the bits of keys and of values.
        every_s: seconds from one look to the next.
    """

    def __init__(
        self, engine: Engine, tell: Callable[[int, float, float], None], every_s: float = LOOK_S
    ) -> None:
        self._engine = engine
        self._tell = tell
        self._every_s = every_s
        self._next_s = 0.0
        self._n = 0

    def after_step(self, now_s: float) -> None:
        """Look, if it is time; called between two steps."""
        if now_s < self._next_s:
            return
        nth, layer = divmod(self._n, self._engine.n_layers)
        block = self._engine.read_block(layer, nth)
        if block is not None:
            self._n += 1
            self._next_s = now_s + self._every_s
            self._tell(layer, *kv_entropy(block))


class WeightCheck:
    """Hashes the weights that are computed with, over and over, and compares with what their file says.

    A model that comes from no file is compared with what it was at first, as are adapters. Where kernels keep layers in
    another layout (t80 on CPUs with AVX2 alone), those are a copy of what is hashed.

    Args:
        checkpoint: packed; the arrays that the engine computes with.
        on_pass: called after each pass with the names of the tensors that differ.
        more: arrays to watch besides, by names that no tensor has.
        rest: seconds of rest for each second of hashing.
        period_s: least seconds from the start of one pass to that of the next.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        on_pass: Callable[[list[str]], None],
        more: Mapping[str, UInt16] = MappingProxyType({}),
        rest: float = REST,
        period_s: float = PERIOD_S,
    ) -> None:
        self._arrays = arrays(checkpoint) | dict(more)
        self._expected = dict(checkpoint.sha256)
        self._on_pass = on_pass
        self._rest = rest
        self._period_s = period_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="onebit-weights", daemon=True)

    def start(self) -> None:
        """Begin the first pass."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            begun_s = time.monotonic()
            changed = []
            for name, array in self._arrays.items():
                found = self._hash(array.reshape(-1).view(np.uint8).data)
                if found is None:
                    return
                if found != self._expected.setdefault(name, found):
                    changed.append(name)
            self._on_pass(changed)
            if self._closing.wait(max(begun_s + self._period_s - time.monotonic(), 0)):
                return

    def _hash(self, data: memoryview) -> str | None:
        """Hash piece by piece; None if the thread has to end."""
        total = hashlib.sha256()
        for begin in range(0, len(data), PIECE_BYTES):
            begun_s = time.monotonic()
            total.update(data[begin : begin + PIECE_BYTES])
            if self._closing.wait((time.monotonic() - begun_s) * self._rest):
                return None
        return total.hexdigest()
