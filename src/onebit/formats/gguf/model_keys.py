"""The keys of a GGUF file that say what a model computes: to a ModelConfig, and back.

    config, architecture = read(metadata, vocab_size, tied_head=True, qkv_bias=False, rope_factors=None)
    keys(config, "llama"), rope_factors(config)

What these keys can say and onebit cannot do is refused, and so is a key that nobody here knows: it may change what the
model computes. Source: llama.cpp, src/llama-arch.cpp, src/llama-model.cpp, src/llama-context.cpp.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from onebit.config import FfnActivation, ModelConfig, RopeScaling
from onebit.formats.families import family
from onebit.formats.tensors import shorten
from onebit.packing import Float32

ARCHITECTURES = ("llama", "qwen2", "qwen3", "bitnet", "bitnet-b1.58", "bitnet-25")

# Those whose files hold rotary pairs as neighbours: rows of q and k are in another order there.
PERMUTED = ("llama",)

# Those whose feed-forward layers square a ReLU, where no key says anything else. The graph named bitnet has SiLU.
_RELU2 = ("bitnet-b1.58", "bitnet-25")

# Keys that are read here or change nothing.
_KNOWN = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "hidden_activation",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.causal",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_ext_factor",
    "tensor_data_layout",
)

# What Llama 3.1 and 3.2 use; a file has the result alone, a divisor for each pair.
_LLAMA3_CONTEXT = 8192


def architecture(metadata: Mapping[str, Any]) -> str:
    """The architecture of a file.

    Raises:
        ValueError: one that is not supported.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        expected = ", ".join(ARCHITECTURES)
        raise ValueError(f"general.architecture is {shorten(name)}; onebit reads {expected}")
    return name


def read(
    metadata: Mapping[str, Any],
    vocab_size: int,
    tied_head: bool,
    qkv_bias: bool,
    rope_factors: Float32 | None,
) -> ModelConfig:
    """The shape and flags of a model, as if its weights were dense.

    Args:
        metadata: keys and values of the file.
        vocab_size: rows of the embedding.
        tied_head: whether the file has no head.
        qkv_bias: whether it has biases.
        rope_factors: its tensor rope_freqs, or None.

    Raises:
        ValueError: a key that is missing, impossible, or asks for what onebit cannot do.
    """
    keys = _Keys(metadata, architecture(metadata))
    keys.check()
    n_heads = keys.count("attention.head_count")
    d_model = keys.count("embedding_length")
    d_head = keys.count("attention.key_length", d_model // n_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (found := keys.count(name, d_head)) != d_head:
            raise ValueError(
                f"{keys.prefix}{name} is {found}, and a head is {d_head} wide; onebit needs both equal"
            )
    if (found := keys.count("vocab_size", vocab_size)) != vocab_size:
        raise ValueError(f"{keys.prefix}vocab_size is {found}; the embedding has {vocab_size} rows")
    context = keys.count("context_length")
    config = ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=keys.count("block_count"),
        n_heads=n_heads,
        n_kv_heads=keys.count("attention.head_count_kv", n_heads),
        d_head=d_head,
        d_ff=keys.count("feed_forward_length"),
        max_seq_len=context,
        rope_theta=keys.number("rope.freq_base", 10000.0),
        rope_scaling=_read_scaling(keys, context),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        activation=_read_activation(keys),
        sub_norm=keys.name.startswith("bitnet"),
        qk_norm=keys.name == "qwen3",
        qkv_bias=qkv_bias,
        tied_head=tied_head,
        weights="dense",
        activations="none",
    )
    if rope_factors is None:
        return config
    return replace(config, rope_scaling=_read_factors(config, rope_factors, keys))


def architecture_for(config: ModelConfig) -> str:
    """The architecture that computes a model.

    Raises:
        ValueError: there is none.
    """
    name = family(config)
    if name == "bitnet":
        return "bitnet-b1.58" if config.activation == "relu2" else "bitnet"
    if config.activation != "silu":
        raise ValueError(
            f"no architecture of GGUF has {config.activation} without sub-norms; keep the model as a .onebit file"
        )
    return name


def keys(config: ModelConfig, name: str) -> dict[str, Any]:
    """The keys of a model of an architecture, the inverse of `read`.

    Raises:
        ValueError: positions that no key can describe.
    """
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_seq_len,
        "embedding_length": config.d_model,
        "block_count": config.n_layers,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.d_head,
        "attention.value_length": config.d_head,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.d_head,
        "rope.freq_base": float(config.rope_theta),
    }
    if name in _RELU2:
        values["hidden_activation"] = config.activation
    return {f"{name}.{key}": value for key, value in (values | _scaling_keys(config)).items()}


def rope_factors(config: ModelConfig) -> Float32 | None:
    """What divides the frequency of each pair, for a model of the llama3 kind of positions; else None.

    Returns:
        float32 [d_head / 2].
    """
    if config.rope_scaling is None or config.rope_scaling.rope_type != "llama3":
        return None
    return _factors(config, config.rope_scaling)


class _Keys:
    """The keys of one architecture, checked when they are asked for."""

    def __init__(self, metadata: Mapping[str, Any], name: str) -> None:
        self.metadata = metadata
        self.name = name
        self.prefix = f"{name}."

    def check(self) -> None:
        """Refuse what is unknown and not off."""
        for key, value in self.metadata.items():
            if "hadamard" in key.lower():
                raise ValueError(f"key {shorten(key)}: onebit has no Hadamard transforms of activations")
            if not key.startswith(self.prefix) or key.removeprefix(self.prefix) in _KNOWN:
                continue
            if isinstance(value, (bool, int, float)) and not value:
                continue
            # A window that sees all there is.
            is_window = key == f"{self.prefix}attention.sliding_window" and isinstance(value, int)
            if is_window and value >= self.count("context_length"):
                continue
            raise ValueError(
                f"key {shorten(key)} is {shorten(value)}; onebit does not know it, or cannot do what it asks for"
            )
        if self.metadata.get(f"{self.prefix}attention.causal", True) is not True:
            raise ValueError(
                f"{self.prefix}attention.causal is not true; onebit runs models that go left to right"
            )

    def value(self, key: str, default: Any) -> Any:
        value = self.metadata.get(self.prefix + key, default)
        if value is None:
            raise ValueError(f"key {self.prefix}{key} is missing; the file is damaged or not complete")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number; one for each layer where all are equal."""
        value = self.value(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if type(value) is not int or not 0 < value < 2**24:
            found = f"{self.prefix}{key} is {shorten(value)}"
            raise ValueError(f"{found}; expected a whole number from 1 to 2^24 - 1, the same in every layer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number: the decimal one that was rounded to float32."""
        found = value = self.value(key, default)
        if not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) < 2.0**127:
            found = float(str(np.float32(value)))
        if not isinstance(found, float) or not 0 < found < 2.0**127:
            raise ValueError(f"{self.prefix}{key} is {shorten(value)}; expected a positive number")
        return found


def _read_activation(keys: _Keys) -> FfnActivation:
    value = keys.value("hidden_activation", "relu2" if keys.name in _RELU2 else "silu")
    for name in ("silu", "relu2"):
        if isinstance(value, str) and value == name:
            return name
    raise ValueError(f"{keys.prefix}hidden_activation is {shorten(value)}; onebit has silu and relu2")


def _read_scaling(keys: _Keys, context: int) -> RopeScaling | None:
    kind = keys.value("rope.scaling.type", "linear")
    if not isinstance(kind, str):
        raise ValueError(f"{keys.prefix}rope.scaling.type is {shorten(kind)}; expected a text")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    multiplier = keys.number("rope.scaling.attn_factor", 1.0)
    if multiplier != 1 and kind != "yarn":
        raise ValueError(
            f"{keys.prefix}rope.scaling.attn_factor is {multiplier}; onebit has it for yarn only"
        )
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    values: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        if keys.number("rope.scaling.yarn_ext_factor", 1.0) != 1:
            raise ValueError(f"{keys.prefix}rope.scaling.yarn_ext_factor is not 1; onebit has no other yarn")
        values |= {
            "original_max_position_embeddings": keys.count("rope.scaling.original_context_length", context),
            "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
        }
    if multiplier != 1:
        values["attention_factor"] = multiplier * (0.1 * math.log(factor) + 1)
    return RopeScaling.from_dict(values)


def _scaling_keys(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    if scaling.rope_type == "llama3":
        _check_told(config, scaling)
        # llama.cpp knows only the factors. The context is for us: it needs no guess then.
        return {"rope.scaling.original_context_length": scaling.original_max_position_embeddings}
    values: dict[str, Any] = {
        "rope.scaling.type": scaling.rope_type,
        "rope.scaling.factor": float(scaling.factor),
    }
    if scaling.rope_type == "linear":
        return values
    # The keys of the betas are there, but llama.cpp passes over them in these architectures.
    if not scaling.truncate or (scaling.beta_fast, scaling.beta_slow) != (32, 1):
        raise ValueError(
            "llama.cpp has no yarn without truncate, or with other values than beta_fast 32 and beta_slow 1; keep the "
            "model as a .onebit file"
        )
    values["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
    if scaling.attention_factor is not None:
        values["rope.scaling.attn_factor"] = config.rope_attention_factor / (
            0.1 * math.log(scaling.factor) + 1
        )
    return values


def _check_told(config: ModelConfig, scaling: RopeScaling) -> None:
    """Refuse a llama3 scaling that `_read_factors` would not find in its divisors: the file could not be read again."""
    found = _factors(config, scaling)
    factor = max(float(str(found.max())), 1.0)
    told = RopeScaling("llama3", factor, scaling.original_max_position_embeddings)
    if not np.allclose(found, _factors(config, told), rtol=1e-4, atol=0):
        raise ValueError(
            f"a GGUF file has the divisors of llama3 positions alone, and factor {scaling.factor:g} with "
            f"low_freq_factor {scaling.low_freq_factor:g} and high_freq_factor {scaling.high_freq_factor:g} cannot be "
            "told from them; keep the model as a .onebit file"
        )


def _read_factors(config: ModelConfig, found: Float32, keys: _Keys) -> RopeScaling | None:
    """The llama3 scaling whose divisors these are."""
    if config.rope_scaling is not None:
        raise ValueError(
            f"the file has rope_freqs.weight and {keys.prefix}rope.scaling; onebit needs one of both"
        )
    if found.shape != (config.d_head // 2,) or not (np.isfinite(found) & (found >= 1)).all():
        raise ValueError(f"rope_freqs.weight holds no {config.d_head // 2} divisors; the file is damaged")
    factor = float(found.max())
    if factor == 1:
        return None
    context = keys.count("rope.scaling.original_context_length", _LLAMA3_CONTEXT)
    scaling = RopeScaling("llama3", float(str(np.float32(factor))), context)
    if not np.allclose(found, _factors(config, scaling), rtol=1e-4, atol=0):
        raise ValueError(
            f"rope_freqs.weight is not that of Llama 3 with factor {factor:g} and context {context}: onebit cannot "
            "tell which positions it means; convert the original Hugging Face folder instead"
        )
    return scaling


def _factors(config: ModelConfig, scaling: RopeScaling) -> Float32:
    plain = replace(config, rope_scaling=None).rope_frequencies()
    stretched: Float32 = np.array(scaling.stretch(plain, config.rope_theta), np.float32)
    divisors: Float32 = np.array(plain, np.float32) / stretched
    return divisors
