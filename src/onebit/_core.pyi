"""The compiled core of onebit. Only onebit.engine.model imports it."""

from types import ModuleType

import numpy
import numpy.typing

BLOCK_TOKENS: int
SPLIT_TOKENS: int
kernels: ModuleType

def available_isas() -> list[str]:
    """Names of the instruction sets that this build and this CPU run, best first."""

def broken_isas() -> list[str]:
    """Names of the instruction sets that this CPU should run, and whose kernels failed their self-test."""

def self_test() -> dict[str, list[str]]:
    """Kernels that now answer otherwise than the scalar ones, by instruction sets that this CPU should run."""

def sincos(x: float) -> tuple[float, float]:
    """The float64 sine and cosine behind the rotary position angles, for 0 <= x < 2^24."""

def sample(
    logits: numpy.typing.NDArray[numpy.float32],
    ids: numpy.typing.NDArray[numpy.int32],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int,
    counter: int,
) -> list[int]:
    """Draw token ids from logits [R, V] while they equal the last R - 1 ids; those before are prompt and output."""

def exp_negative(x: float) -> float:
    """The float64 exponential behind the sampler, for x <= 0."""

def philox(counter_low: int, counter_high: int, key: int) -> tuple[int, int, int, int]:
    """Four random words of Philox 4x32-10."""

class PackedMatrix:
    """A packed matrix that borrows its arrays."""

    def __init__(
        self,
        encoding: str,
        n: int,
        k: int,
        data: numpy.typing.NDArray[numpy.uint8],
        scale: numpy.typing.NDArray[numpy.float32],
    ) -> None:
        """data: uint8 [tiles, k_padded / 4, 64]; scale: float32 [1], [n] or [n, groups]."""

class KvCache:
    """Keys and values in blocks of BLOCK_TOKENS positions."""

    @property
    def n_blocks(self) -> int:
        """Blocks in the cache."""

    @property
    def bytes(self) -> int:
        """Memory of all blocks."""

    def read_block(self, layer: int, block: int, out: numpy.typing.NDArray[numpy.float32]) -> None:
        """Writes keys and values of a block, [2, kv heads, BLOCK_TOKENS, d_head]; no forward pass may write them."""

class Model:
    """A transformer that borrows its weights."""

    def __init__(
        self,
        config: object,
        tensors: dict[
            str, PackedMatrix | numpy.typing.NDArray[numpy.float32] | numpy.typing.NDArray[numpy.uint16]
        ],
        inv_freq: numpy.typing.NDArray[numpy.float32],
        isa: str,
        threads: int,
        int4_shortlist: bool,
        adapters: list[
            tuple[
                float,
                dict[str, tuple[numpy.typing.NDArray[numpy.uint16], numpy.typing.NDArray[numpy.uint16]]],
            ]
        ],
    ) -> None:
        """config: a ModelConfig; tensors by name, bfloat16 as uint16; adapters: (scale, planes of A and B by name)."""

    def new_cache(self, n_blocks: int, kv_cache: str) -> KvCache:
        """A cache of n_blocks blocks for this model, all zeros; kv_cache: bf16, int8 or fp8."""

    def forward(
        self,
        tokens: numpy.typing.NDArray[numpy.int32],
        positions: numpy.typing.NDArray[numpy.int32],
        seq_starts: numpy.typing.NDArray[numpy.int32],
        block_tables: numpy.typing.NDArray[numpy.int32],
        rows: numpy.typing.NDArray[numpy.int32],
        top_k: numpy.typing.NDArray[numpy.int32],
        cache: KvCache,
        logits: numpy.typing.NDArray[numpy.float32],
        adapters: numpy.typing.NDArray[numpy.int32],
        code_counts: numpy.typing.NDArray[numpy.int64] | None = None,
    ) -> None:
        """Writes the logits [R, V] of the tokens in rows; see onebit.engine.model.Model.forward."""

    def forward_hidden(
        self,
        tokens: numpy.typing.NDArray[numpy.int32],
        positions: numpy.typing.NDArray[numpy.int32],
        seq_starts: numpy.typing.NDArray[numpy.int32],
        block_tables: numpy.typing.NDArray[numpy.int32],
        rows: numpy.typing.NDArray[numpy.int32],
        cache: KvCache,
        hidden: numpy.typing.NDArray[numpy.float32],
        adapters: numpy.typing.NDArray[numpy.int32],
    ) -> None:
        """Writes the hidden states [R, D] of the tokens in rows; see onebit.engine.model.Model.forward_hidden."""

    @property
    def isa(self) -> str:
        """Instruction set of the kernels."""

    @property
    def threads(self) -> int:
        """Threads in the pool."""
