"""The compiled core as Python sees it: a packed checkpoint in, logits and tokens out.

The only importer of `onebit._core`. Weights are used in place, without a copy. Knows nothing of texts or requests.

    model = Model(checkpoint)
    cache = model.new_cache(n_blocks=8)
    logits_RV = model.forward(tokens, positions, seq_starts, block_tables, rows, cache)
"""

import os
import warnings
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onebit import _core
from onebit.checkpoint import Checkpoint, Stored, Tensor
from onebit.config import ModelConfig
from onebit.formats.adapter import Adapter, check_base
from onebit.packing import PackedTensor, UInt16, bf16_planes, bf16_rows

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
KvCache = _core.KvCache

# Positions in one block of a KvCache, and in one split of the keys of attention.
BLOCK_TOKENS: int = _core.BLOCK_TOKENS
SPLIT_TOKENS: int = _core.SPLIT_TOKENS

# What the linear layers of a transformer layer read; gate and up share an input, as q, k and v do.
LAYER_INPUTS = ("qkv", "o", "gate_up", "down")

MAX_THREADS = 1024


class Model:
    """A packed model on this machine's CPU. Immutable; calls from several threads take turns.

    Logits are the same bits for every instruction set, number of threads, mix of sequences in a batch and
    division of a sequence into calls.

    Args:
        checkpoint: a packed checkpoint, as `onebit.checkpoint.quantize` makes it.
        threads: threads to compute on; None takes ONEBIT_THREADS, else `default_threads()`.
        isa: instruction set, one of `available_isas()`; None takes ONEBIT_ISA, else the best one.
        int4_shortlist: find the best logits through 4-bit rows, with a bound that is only probable.
        adapters: low-rank changes that a sequence can ask for, by their place here.

    Raises:
        ValueError: a checkpoint that is not packed, an adapter of another model, an instruction set that is not
            available here, a number of threads outside [1, 1024], or an input too wide for exact sums.
        OSError: the system refuses so many threads.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        threads: int | None = None,
        isa: str | None = None,
        int4_shortlist: bool = False,
        adapters: Sequence[Adapter] = (),
    ) -> None:
        if not checkpoint.is_packed:
            raise ValueError(
                f"the checkpoint is a float32 master with {checkpoint.config.weights} weights; "
                "the engine runs packed models: quantize it first"
            )
        self.config: ModelConfig = checkpoint.config
        tensors = {name: _to_core(tensor) for name, tensor in checkpoint.tensors.items()}
        frequencies = np.array(self.config.rope_frequencies(), np.float32)
        isa, threads = choose_isa(isa), choose_threads(threads)
        # Adapters that a sequence can ask for.
        self.n_adapters = len(adapters)
        added = [(adapter.scale, _to_planes(adapter, checkpoint)) for adapter in adapters]
        # What is computed with of them, by names of no file: the memory of A and B.
        self.adapter_arrays: dict[str, UInt16] = {
            f"adapter {i}, {name}.{part}": planes
            for i, (_, pairs) in enumerate(added)
            for name, pair in pairs.items()
            for part, planes in zip("ab", pair, strict=True)
        }
        try:
            self._core = _core.Model(self.config, tensors, frequencies, isa, threads, int4_shortlist, added)
        except RuntimeError as error:
            # The one thing in there that the system can deny.
            raise OSError(f"the system refuses {threads} threads ({error}); ask for fewer") from None

    @property
    def isa(self) -> str:
        """Instruction set of the kernels."""
        return self._core.isa

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self._core.threads

    def new_cache(self, n_blocks: int, kv_cache: str = "bf16") -> KvCache:
        """Make an empty cache of keys and values.

        Args:
            n_blocks: blocks of BLOCK_TOKENS positions.
            kv_cache: number format, one of `onebit.engine.memory.KV_FORMATS`.

        Raises:
            ValueError: no block at all, an unknown format, or heads too wide for int8.
            MemoryError: more blocks than memory holds.
        """
        return self._core.new_cache(n_blocks, kv_cache)

    def forward(
        self,
        tokens: Int32,
        positions: Int32,
        seq_starts: Int32,
        block_tables: Int32,
        rows: Int32,
        cache: KvCache,
        top_k: Int32 | None = None,
        out: Float32 | None = None,
        adapters: Int32 | None = None,
        code_counts: Int64 | None = None,
    ) -> Float32:
        """Run sequences, one after another in `tokens`, and return the logits of some of their tokens.

        Keys and values of the tokens go into the cache; those of all earlier positions must be there. The
        arrays must not change during the call.

        Args:
            tokens: int32 [T], token ids.
            positions: int32 [T], consecutive within a sequence.
            seq_starts: int32 [S + 1], where each sequence begins in tokens, and T.
            block_tables: int32 [S, B], cache blocks of each sequence: block b holds positions
                [b * BLOCK_TOKENS, (b + 1) * BLOCK_TOKENS). Entries that are not reached may have any value.
            rows: int32 [R], indices of the tokens whose logits are wanted.
            cache: from `new_cache` of this model.
            top_k: int32 [R], how many of the best logits of each row are needed; 0 or None: all. The others may
                be -infinity; equal ones of the k-th best are kept.
            out: float32 [R, V], memory for the result; None makes some.
            adapters: int32 [S], which adapter each sequence runs with, -1 for none; None: none. Keys and values in
                the cache must have been computed with the same one.
            code_counts: int64 [layers, LAYER_INPUTS, 2], gets two counts added for each input of linear layers: codes
                of all these tokens that are the least or the largest of their quantiser (+-127 for a8, +-16256 for a15,
                -8 and 7 for a4; none of a1 and of floats), and zeros. The logits are the same. None: nobody counts.

        Returns:
            float32 [R, V], out if it is given.

        Raises:
            ValueError: an array of another dtype or shape, or a value out of range.
        """
        top_k = np.zeros(len(rows), np.int32) if top_k is None else top_k
        out = np.empty((len(rows), self.config.vocab_size), np.float32) if out is None else out
        adapters = np.full(len(block_tables), -1, np.int32) if adapters is None else adapters
        self._core.forward(
            tokens, positions, seq_starts, block_tables, rows, top_k, cache, out, adapters, code_counts
        )
        return out

    def input_widths(self) -> list[int]:
        """Values of one token in each of LAYER_INPUTS."""
        shapes = self.config.linear_shapes()
        return [shapes[name][1] for name in ("q", "o", "gate", "down")]

    def read_block(self, cache: KvCache, layer: int, block: int) -> Float32:
        """Copy the keys and values of a block, as attention reads them.

        No forward pass may write to the cache meanwhile.

        Args:
            cache: from `new_cache` of this model.
            layer: which layer's.
            block: which block; positions of it that were never written are zeros.

        Returns:
            float32 [2, kv heads, BLOCK_TOKENS, d_head]: keys, then values.

        Raises:
            ValueError: there is no such layer or block.
        """
        out = np.empty((2, self.config.n_kv_heads, BLOCK_TOKENS, self.config.d_head), np.float32)
        cache.read_block(layer, block, out)
        return out

    def forward_hidden(
        self,
        tokens: Int32,
        positions: Int32,
        seq_starts: Int32,
        block_tables: Int32,
        rows: Int32,
        cache: KvCache,
        adapters: Int32,
    ) -> Float32:
        """Run sequences as `forward` does, with its arguments, and return what the head would multiply.

        That is the output of the last layer after the final norm.

        Returns:
            float32 [R, D].

        Raises:
            ValueError: an array of another dtype or shape, or a value out of range.
        """
        out = np.empty((len(rows), self.config.d_model), np.float32)
        self._core.forward_hidden(tokens, positions, seq_starts, block_tables, rows, cache, out, adapters)
        return out


def sample(
    logits_RV: Float32,
    ids: Int32,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int,
    counter: int,
) -> list[int]:
    """Draw the next token, and go on for as long as the draws are those that were guessed.

    Row r holds the logits after `ids[: len(ids) - R + 1 + r]`: the last R - 1 ids are guesses. A draw depends on
    nothing but its row, the ids before it, the parameters, the seed and its place, counter + r.

    Applied in this order: repetition penalty, temperature, top_k, top_p, min_p, the draw. Tokens rank by
    descending logit, equal ones by ascending id.

    Args:
        logits_RV: float32 [R, V], not NaN.
        ids: int32, prompt and output, then R - 1 guesses.
        temperature: divides the logits; 0 takes the best token.
        top_k: keep the k best tokens; 0 keeps all.
        top_p: keep the fewest best tokens whose probabilities reach top_p; 1 keeps all.
        min_p: keep tokens at least min_p times as likely as the best; 0 keeps all.
        repetition_penalty: positive logits of tokens before the draw are divided by it, others multiplied; 1 is off.
        seed: of the random numbers, from 0 to 2^64 - 1.
        counter: the position of the first draw, from 0 to 2^64 - 1: which random number of the seed to take.

    Returns:
        From 1 to R token ids; all but the last equal the guesses.

    Raises:
        ValueError: a value out of range, or logits that are NaN, infinite or all -infinity.
    """
    for name, value in (("seed", seed), ("counter", counter)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} is {value}; expected 0 to 2^64 - 1")
    # More than all tokens means the same as all of them, also beyond the core's int64.
    top_k = min(top_k, logits_RV.shape[-1])
    return _core.sample(logits_RV, ids, temperature, top_k, top_p, min_p, repetition_penalty, seed, counter)


def available_isas() -> list[str]:
    """Instruction sets that this build and this CPU run, best first; "scalar" is always the last."""
    return _core.available_isas()


def broken_isas() -> list[str]:
    """Instruction sets that this CPU should run, but whose kernels gave wrong results when the core tested itself."""
    return _core.broken_isas()


def self_test() -> dict[str, list[str]]:
    """Ask every kernel of every instruction set that this CPU should run again, now.

    Returns:
        By instruction set the kernels whose answer to a small odd case differs from that of the scalar ones; the first
        is the cause, later ones may repeat what it spoiled. "scalar" itself is the measure.
    """
    return _core.self_test()


def choose_isa(isa: str | None = None) -> str:
    """The instruction set asked for: by the argument, else by ONEBIT_ISA, else the best.

    Warns with RuntimeWarning of instruction sets whose kernels gave wrong results when the core tested itself.

    Raises:
        ValueError: an instruction set that is unknown or not available here.
    """
    available = available_isas()
    for broken in broken_isas():
        warnings.warn(
            f"the {broken} kernels give wrong results on this machine and are not used; "
            f"please report your CPU and compiler (running on {available[0]})",
            RuntimeWarning,
            stacklevel=2,
        )
    source = "isa"
    if isa is None and (variable := os.environ.get("ONEBIT_ISA")):
        source, isa = "ONEBIT_ISA", variable
    if isa is None:
        return available[0]
    if isa not in available:
        raise ValueError(f"{source} is {isa!r}; this machine has {', '.join(available)}")
    return isa


def choose_threads(threads: int | None = None) -> int:
    """The number of threads asked for: by the argument, else by ONEBIT_THREADS, else `default_threads()`.

    Raises:
        ValueError: not a whole number from 1 to 1024.
    """
    value: object = threads
    source = "threads"
    if threads is None and (variable := os.environ.get("ONEBIT_THREADS")):
        source, value = "ONEBIT_THREADS", int(variable) if variable.isdecimal() else variable
    if value is None:
        return default_threads()
    if not isinstance(value, Integral) or isinstance(value, bool) or not 1 <= int(value) <= MAX_THREADS:
        raise ValueError(f"{source} is {value!r}; expected a whole number from 1 to {MAX_THREADS}")
    return int(value)


def default_threads() -> int:
    """Physical cores that this process may use: hardware threads that share a core count once."""
    if not hasattr(os, "sched_getaffinity"):
        return min(os.cpu_count() or 1, MAX_THREADS)
    cores = {_siblings(cpu) for cpu in os.sched_getaffinity(0)}
    return min(len(cores), MAX_THREADS)


def _siblings(cpu: int) -> str:
    """The hardware threads of a CPU's core, or the CPU itself where the system does not tell."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text()
    except OSError:
        return str(cpu)


def _to_planes(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, tuple[UInt16, UInt16]]:
    check_base(adapter, checkpoint)
    return {name: (bf16_planes(a), bf16_planes(b)) for name, (a, b) in adapter.tensors.items()}


def _to_core(tensor: Tensor) -> Float32 | UInt16 | _core.PackedMatrix:
    # Of a packed model nothing is left in a file.
    assert not isinstance(tensor, Stored)
    if not isinstance(tensor, PackedTensor):
        return tensor
    if tensor.encoding == "bf16":
        return bf16_rows(tensor)
    n, k = tensor.shape
    return _core.PackedMatrix(tensor.encoding, n, k, tensor.data, tensor.scale)
