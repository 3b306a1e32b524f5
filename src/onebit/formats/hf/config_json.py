"""The config.json of a Hugging Face model: to a ModelConfig and back.

    description = parse(values)         # shape and flags, and what the file says of its weights
    values = build(config, ...)         # what transformers reads

Trusts nothing in a file. Knows no tensors.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, cast

from onebit.config import FfnActivation, ModelConfig, RopeScaling
from onebit.formats.families import family
from onebit.formats.tensors import Json, shorten

# Whether the real weight is the code times weight_scale, or divided by it.
Meaning = Literal["multiplies", "divides"]

CLASSES = {
    "bitnet": "BitNetForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# The first models of the kind, which came with code of their own and say model_type llama.
_OLD_BITNET = "BitnetForCausalLM"
_MAX_TEXT = 64


class _Defaults(NamedTuple):
    """What transformers takes where a config.json says nothing."""

    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    max_seq_len: int = 2048
    activation: str = "silu"
    d_head: int | None = None


_DEFAULTS = {
    "bitnet": _Defaults(500000.0, 1e-5, activation="relu2"),
    "llama": _Defaults(),
    "mistral": _Defaults(max_seq_len=131072),
    "qwen2": _Defaults(max_seq_len=32768),
    "qwen3": _Defaults(max_seq_len=32768, d_head=128),
}
_LINEAR_MODULES = {
    "layers",
    "self_attn",
    "mlp",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
}


@dataclass(frozen=True)
class Description:
    """What a config.json says.

    Args:
        config: shape and flags; its weights are "dense" until the tensors are seen.
        model_type: bitnet, llama, mistral, qwen2 or qwen3.
        meaning: of weight_scale beside packed weights; None where nothing is said of packed weights.
        is_master: weights in floating point are rounded in every pass, with 8-bit activations.
    """

    config: ModelConfig
    model_type: str
    meaning: Meaning | None
    is_master: bool


def parse(values: Mapping[str, Any]) -> Description:
    """Read a config.json.

    Raises:
        ValueError: a model that is none of those we run, another quantisation, or a missing, malformed or
            impossible value.

    Source: the configuration classes and integrations/bitnet.py of transformers.
    """
    model_type, is_old_bitnet = _model_type(values)
    defaults = _DEFAULTS["llama" if is_old_bitnet else model_type]
    _refuse_unsupported(values, model_type)
    d_model, n_heads = _whole(values, "hidden_size"), _whole(values, "num_attention_heads")
    d_head = _whole(values, "head_dim", defaults.d_head or d_model // n_heads or 1)
    max_seq_len = _whole(values, "max_position_embeddings", defaults.max_seq_len)
    rope_theta, rope_scaling = _rope(values, defaults.rope_theta, max_seq_len)
    vocab_size = _whole(values, "vocab_size")
    meaning, is_master = _quantization(values)
    if model_type == "bitnet":
        is_master = True
    config = ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=_whole(values, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=_whole(values, "num_key_value_heads", n_heads),
        d_head=d_head,
        d_ff=_whole(values, "intermediate_size"),
        max_seq_len=max_seq_len,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=_number(values, "rms_norm_eps", defaults.norm_eps),
        activation=_activation(values, defaults.activation),
        sub_norm=model_type == "bitnet",
        qk_norm=model_type == "qwen3",
        qkv_bias=model_type == "qwen2",
        tied_head=_flag(values, "tie_word_embeddings"),
        weights="dense",
        activations="none",
        bos_token=next(iter(tokens(values, "bos_token_id", vocab_size)), None),
        eos_tokens=tokens(values, "eos_token_id", vocab_size),
    )
    return Description(config, model_type, meaning, is_master)


def tokens(values: Mapping[str, Any], name: str, vocab_size: int) -> tuple[int, ...]:
    """The token ids of a field that holds one, a list of them, or null.

    Raises:
        ValueError: anything else, or an id outside the vocabulary.
    """
    value = values.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if len(ids) > 1024 or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise ValueError(
            f"{name} is {shorten(value)}; expected token ids below the vocab_size of {vocab_size}, or null"
        )
    return tuple(dict.fromkeys(ids))


def build(config: ModelConfig, dtype: str, quantization: Json | None) -> Json:
    """The config.json of a model.

    Args:
        config: of the model.
        dtype: "float32", "float16" or "bfloat16", in which transformers computes.
        quantization: quantization_config, or None.

    Raises:
        ValueError: flags that no class of transformers has together.
    """
    model_type = family(config)
    q_width = config.n_heads * config.d_head
    if model_type == "bitnet" and q_width != config.d_model:
        raise ValueError(
            f"{config.n_heads} heads of {config.d_head} are {q_width} wide, the model {config.d_model}; the sub-norm "
            "of transformers' BitNet needs both to be equal: keep this model as a .onebit file"
        )
    if model_type != "qwen3" and config.d_model % config.n_heads:
        raise ValueError(
            f"d_model {config.d_model} is no multiple of the {config.n_heads} heads, as transformers needs it; "
            "keep this model as a .onebit file"
        )
    eos = list(config.eos_tokens)
    values: Json = {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": False,
        "bos_token_id": config.bos_token,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "torch_dtype": dtype,
    }
    if model_type == "llama":
        values["mlp_bias"] = False
    if model_type in ("qwen2", "qwen3"):
        values["use_sliding_window"] = False
    # Both spellings: programs from before 2026 know the first alone.
    values["rope_theta"] = config.rope_theta
    rope: Json = {"rope_type": "default"}
    if config.rope_scaling:
        rope = _rope_scaling(config.rope_scaling)
        values["rope_scaling"] = rope
    values["rope_parameters"] = rope | {"rope_theta": config.rope_theta}
    if quantization:
        values["quantization_config"] = quantization
    return values


def _model_type(values: Mapping[str, Any]) -> tuple[str, bool]:
    """The family, and whether it is a BitNet of the first kind."""
    model_type, classes = values.get("model_type"), values.get("architectures")
    known = f"onebit reads {', '.join(_DEFAULTS)}"
    if classes is not None and not (isinstance(classes, list) and len(classes) == 1):
        raise ValueError(f"architectures is {shorten(classes)}; expected a list of one class; {known}")
    name = classes[0] if classes else None
    if name == _OLD_BITNET:
        return "bitnet", model_type != "bitnet"
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        raise ValueError(
            f"model_type is {shorten(model_type)}, a kind of model that does not run here; {known}"
        )
    expected = CLASSES.get(model_type, "MistralForCausalLM")
    if name not in (None, expected):
        raise ValueError(f"architectures is {shorten(name)}; expected {expected} for model_type {model_type}")
    return model_type, False


def _refuse_unsupported(values: Mapping[str, Any], model_type: str) -> None:
    for name in ("attention_bias", "mlp_bias"):
        # The class of Qwen2 reads neither: its biases are fixed.
        if _flag(values, name) and model_type != "qwen2":
            raise ValueError(f"{name} is true; onebit has biases of q, k and v alone, those of Qwen2")
    window = values.get("sliding_window") if model_type == "mistral" else None
    # One as wide as the context hides nothing.
    context = values.get("max_position_embeddings")
    is_wide = isinstance(window, int) and isinstance(context, int) and window >= context
    if (window is not None and not is_wide) or _flag(values, "use_sliding_window"):
        raise ValueError(
            f"sliding_window is {shorten(values.get('sliding_window'))} and in use; onebit runs models whose tokens "
            "see the whole text"
        )
    layers = values.get("layer_types")
    if layers is not None and not (
        isinstance(layers, list) and all(kind == "full_attention" for kind in layers)
    ):
        raise ValueError(f"layer_types is {shorten(layers)}; expected full_attention in every layer")
    for where in (values, values.get("rope_parameters"), values.get("rope_scaling")):
        share = where.get("partial_rotary_factor") if isinstance(where, Mapping) else None
        if share is not None and (isinstance(share, bool) or share != 1):
            raise ValueError(
                f"partial_rotary_factor is {shorten(share)}; onebit rotates whole heads, a factor of 1"
            )
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if values.get(name) not in (None, 0, 1):
            raise ValueError(f"{name} is {shorten(values[name])}; onebit runs no mixtures of experts")


def _rope(
    values: Mapping[str, Any], default_theta: float, max_seq_len: int
) -> tuple[float, RopeScaling | None]:
    """Base and stretch of the rotary positions, in the old spelling or the new one."""
    # As transformers does where both are given.
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    table = values.get(name)
    table = {} if table is None else table
    if not isinstance(table, Mapping):
        raise ValueError(f"{name} is {shorten(table)}; expected a table or null")
    for key, value in table.items():
        if isinstance(value, Mapping):
            raise ValueError(
                f"{name} has a table {shorten(key)}: positions that differ by layer do not run here"
            )
        is_plain = isinstance(value, bool | int | float | str | None) and len(str(value)) < _MAX_TEXT
        if not (is_plain and key.isascii() and key.isprintable() and len(key) < _MAX_TEXT):
            raise ValueError(
                f"{name} holds {shorten(key)}: {shorten(value)}; expected a number or a short word"
            )
    table = {key: value for key, value in table.items() if value is not None}
    theta = _number(table, "rope_theta", _number(values, "rope_theta", default_theta))
    table = {key: value for key, value in table.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if not table:
        return theta, None
    kind = table.get("rope_type", table.get("type", "default"))
    table.setdefault("rope_type", kind)
    if kind in ("llama3", "yarn"):
        name = "original_max_position_embeddings"
        original = _whole(values, name, _whole(table, name, max_seq_len))
        table[name] = original
        if kind == "yarn" and "factor" not in table:
            table["factor"] = max_seq_len / original
    for key in ("attn_factor", "finetuned"):
        # Of converters long gone; transformers reads neither.
        table.pop(key, None)
    return theta, RopeScaling.from_dict(table)


def _rope_scaling(scaling: RopeScaling) -> Json:
    """The values of a stretch that its type has."""
    names = {
        "linear": ("factor",),
        "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        "yarn": (
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "truncate",
            "attention_factor",
        ),
    }[scaling.rope_type]
    values = asdict(scaling)
    return {"rope_type": scaling.rope_type} | {
        name: values[name] for name in names if values[name] is not None
    }


def _quantization(values: Mapping[str, Any]) -> tuple[Meaning | None, bool]:
    """What weight_scale means, if anything is said of it, and whether float weights are a master."""
    for name in ("quantization", "compression_config"):
        if values.get(name) is not None:
            raise ValueError(f"{name} is {shorten(values[name])}; {_QUANTIZATIONS}")
    is_master = _flag(values, "is_bitnet_config")
    if values.get("weight_bits") is not None:
        bits = values["weight_bits"], values.get("input_bits", 8)
        if bits != (1, 8):
            raise ValueError(
                f"weight_bits and input_bits are {shorten(bits)}; expected 1 and 8, as BitNets have them"
            )
        is_master = True
    table = values.get("quantization_config")
    if table is None:
        return None, is_master
    if not isinstance(table, Mapping):
        raise ValueError(f"quantization_config is {shorten(table)}; expected a table or null")
    if table.get("quant_method") != "bitnet":
        raise ValueError(
            f"quantization_config: quant_method is {shorten(table.get('quant_method'))}; {_QUANTIZATIONS}"
        )
    if _flag(table, "use_rms_norm"):
        raise ValueError(
            "quantization_config: use_rms_norm is true, which puts one more norm before every linear layer; no family "
            "of onebit has these"
        )
    linear_class = table.get("linear_class") or "bitlinear"
    if linear_class not in ("bitlinear", "autobitlinear"):
        raise ValueError(
            f"quantization_config: linear_class is {shorten(linear_class)}; expected bitlinear or autobitlinear"
        )
    mode = table.get("quantization_mode") or "offline"
    if mode not in ("offline", "online"):
        raise ValueError(
            f"quantization_config: quantization_mode is {shorten(mode)}; expected offline or online"
        )
    _check_kept(table.get("modules_to_not_convert"))
    return ("multiplies" if linear_class == "autobitlinear" else "divides"), True


_QUANTIZATIONS = (
    "onebit reads bitnet and unquantised models: take the original of this model, and let onebit pack it"
)


def _check_kept(kept: object) -> None:
    """Refuse linear layers of blocks that stay in full precision."""
    if kept is None:
        return
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        raise ValueError(
            f"quantization_config: modules_to_not_convert is {shorten(kept)}; expected a list of names"
        )
    for name in kept:
        parts = name.removesuffix(".weight").split(".")
        if (_LINEAR_MODULES & set(parts) or parts == ["model"]) and not parts[-1].endswith("norm"):
            raise ValueError(
                f"quantization_config: modules_to_not_convert names {shorten(name)}; onebit needs all seven linear "
                "layers of every block in one scheme"
            )


def _activation(values: Mapping[str, Any], default: str) -> FfnActivation:
    value = values.get("hidden_act")
    value = default if value is None else value
    if value not in ("silu", "relu2"):
        raise ValueError(f"hidden_act is {shorten(value)}; expected silu or relu2")
    return cast(FfnActivation, value)


def _whole(values: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = values.get(name)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{name} is missing; expected a whole number")
    if type(value) is not int or not 0 < value < 2**24:
        raise ValueError(f"{name} is {shorten(value)}; expected a whole number from 1 to 2^24 - 1")
    return value


def _number(values: Mapping[str, Any], name: str, default: float) -> float:
    value = values.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2.0**127:
        raise ValueError(f"{name} is {shorten(value)}; expected a positive number")
    return float(value)


def _flag(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} is {shorten(value)}; expected true or false")
    return value is True
