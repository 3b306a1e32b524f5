"""Train, pack and run 1-bit and 1.58-bit language models on ordinary CPUs.

import onebit

llm = onebit.load()
print(llm.generate("Once upon a time", max_tokens=64).text)

Names are loaded on first use, so that `import onebit` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onebit.checkpoint import Checkpoint
    from onebit.config import ModelConfig
    from onebit.conversion import convert
    from onebit.engine.sampling import SamplingParams
    from onebit.llm import LLM, load
    from onebit.train.recipes import Recipe

__version__ = "0.1.0"

__all__ = ["LLM", "Checkpoint", "ModelConfig", "Recipe", "SamplingParams", "convert", "load"]

_HOME = {
    "LLM": "onebit.llm",
    "Checkpoint": "onebit.checkpoint",
    "ModelConfig": "onebit.config",
    "Recipe": "onebit.train.recipes",
    "SamplingParams": "onebit.engine.sampling",
    "convert": "onebit.conversion",
    "load": "onebit.llm",
}


if not TYPE_CHECKING:
    # Hidden from type checkers, for which it would make every misspelt name valid.
    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'onebit' has no attribute {name!r}")
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
