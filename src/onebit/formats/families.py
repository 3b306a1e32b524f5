"""Which family a model belongs to, by the flags of its config: what other formats call its architecture.

    family(config)      # "bitnet"

docs/families.md lists them with their evidence.
"""

from typing import Literal

from onebit.config import ModelConfig

Family = Literal["bitnet", "llama", "qwen2", "qwen3"]


def family(config: ModelConfig) -> Family:
    """The family that has the flags of a config: "bitnet" has sub-norms, "qwen3" norms of heads, "qwen2" biases.

    Raises:
        ValueError: flags that no family has together.
    """
    if config.hadamard:
        raise ValueError(
            "hadamard: no other program rotates the inputs of a model so; it can only be kept as a .onebit file"
        )
    flags = {"bitnet": config.sub_norm, "qwen3": config.qk_norm, "qwen2": config.qkv_bias}
    names: list[Family] = ["bitnet", "qwen3", "qwen2"]
    found = [name for name in names if flags[name]]
    if len(found) > 1:
        raise ValueError(
            f"sub_norm {config.sub_norm}, qk_norm {config.qk_norm} and qkv_bias {config.qkv_bias}: no other program "
            "has a model with these together; it can only be kept as a .onebit file"
        )
    return found[0] if found else "llama"
