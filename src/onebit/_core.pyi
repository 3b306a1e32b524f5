"""Types of the compiled core; documented in core/bindings/python.cpp."""

from types import ModuleType

import numpy as np
import numpy.typing as npt

from onebit.config import ModelConfig

BLOCK_TOKENS: int
kernels: ModuleType

def available_isas() -> list[str]: ...
def sincos(x: float) -> tuple[float, float]: ...
def exp_negative(x: float) -> float: ...
def philox(counter_low: int, counter_high: int, key: int) -> tuple[int, int, int, int]: ...
def sample(
    logits: npt.NDArray[np.float32],
    history: npt.NDArray[np.int32],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int,
    counter: int,
) -> int: ...

class PackedMatrix:
    def __init__(
        self,
        encoding: str,
        n: int,
        k: int,
        data: npt.NDArray[np.uint8],
        scale: npt.NDArray[np.float32],
    ) -> None: ...

class KvCache:
    @property
    def n_blocks(self) -> int: ...
    @property
    def bytes(self) -> int: ...

class Model:
    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, PackedMatrix | npt.NDArray[np.float32]],
        inv_freq: npt.NDArray[np.float32],
        isa: str,
        threads: int,
    ) -> None: ...
    def new_cache(self, n_blocks: int) -> KvCache: ...
    def forward(
        self,
        tokens: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        seq_starts: npt.NDArray[np.int32],
        block_tables: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int32],
        cache: KvCache,
    ) -> npt.NDArray[np.float32]: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
