"""The shape and the flags of a model: everything that decides its mathematics besides the weights.

A model family is a handful of these flags. Knows nothing of files, tensors or training.

    config = ModelConfig(vocab_size=4096, d_model=320, n_layers=7, n_heads=10, n_kv_heads=5, d_head=32, d_ff=960)
    config.label        # "W1.58A8KV16"
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args

Weights = Literal["b1.58", "b1", "dense"]
Activations = Literal["a15", "a8", "a4.8", "a4", "a1", "none"]
FfnActivation = Literal["silu", "relu2"]
RopeType = Literal["linear", "llama3", "yarn"]

# Fields of a model that are lists in JSON, and of what.
_TUPLES = {"eos_tokens": "token ids", "layer_weights": "schemes"}


def _shown(value: object) -> str:
    """A value of unknown origin as a short piece of ASCII: a message is one line."""
    try:
        text = ascii(value)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched beyond the context that a model was first trained on.

    Names and meanings are those of `rope_scaling` in a Hugging Face config.json; `from_dict` reads one. With
    f = theta^(-2i/d_head), the frequency of pair i, and L = original_max_position_embeddings:

        linear      f / factor
        llama3      f / factor for wavelengths 2 pi / f above L / low_freq_factor, f below L / high_freq_factor,
                    between them a blend that is linear in L f / (2 pi)
        yarn        a blend from f to f / factor, linear in i, between the pairs that turn beta_fast and
                    beta_slow times in L positions; cosines and sines are multiplied by attention_factor

    Args:
        rope_type: "linear", "llama3" or "yarn".
        factor: how far frequencies are divided; at least 1.
        original_max_position_embeddings: L; llama3 and yarn need it.
        low_freq_factor: of llama3.
        high_freq_factor: of llama3.
        beta_fast: of yarn.
        beta_slow: of yarn.
        truncate: of yarn: whether the ends of the blend are rounded outwards to whole pairs.
        attention_factor: of yarn; None takes 0.1 ln(factor) + 1.

    Raises:
        ValueError: values that do not fit together.

    Source: arXiv:2306.15595 (linear), arXiv:2309.00071 (yarn), arXiv:2407.21783 (llama3).
    """

    rope_type: RopeType
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in get_args(RopeType):
            expected = ", ".join(get_args(RopeType))
            raise ValueError(
                f"rope_scaling: rope_type is {_shown(self.rope_type)}; expected one of {expected}"
            )
        names = ["factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"]
        for name in [*names, *(["attention_factor"] if self.attention_factor is not None else [])]:
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 2.0**-31 < value < 2.0**31
            ):
                raise ValueError(
                    f"rope_scaling: {name} is {_shown(value)}; expected a positive number, no tiny or huge one"
                )
        if self.factor < 1:
            raise ValueError(f"rope_scaling: factor is {_shown(self.factor)}; expected at least 1")
        original = self.original_max_position_embeddings
        if self.rope_type != "linear" and (type(original) is not int or not 0 < original < 2**24):
            raise ValueError(
                f"rope_scaling: original_max_position_embeddings is {_shown(original)}; {self.rope_type} needs the "
                "context that the model was first trained on, a whole number of tokens"
            )
        if self.low_freq_factor >= self.high_freq_factor or self.beta_slow >= self.beta_fast:
            raise ValueError(
                "rope_scaling: expected low_freq_factor < high_freq_factor and beta_slow < beta_fast"
            )
        if not isinstance(self.truncate, bool):
            raise ValueError(f"rope_scaling: truncate is {_shown(self.truncate)}; expected true or false")

    def stretch(self, frequencies: list[float], theta: float) -> list[float]:
        """The frequencies of all pairs of a head, made slower."""
        original = self.original_max_position_embeddings or 1
        n = len(frequencies)
        if self.rope_type == "linear":
            # How much of each frequency stays as it is.
            keep = [0.0] * n
        elif self.rope_type == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            keep = [(original * f / math.tau - low) / (high - low) for f in frequencies]
        else:
            # The pair that turns so many times, as a real number; all of them where theta is 1.
            log = math.log(theta) or math.inf
            low, high = (
                n * math.log(original / (turns * math.tau)) / log
                for turns in (self.beta_fast, self.beta_slow)
            )
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, 2 * n - 1)
            keep = [1 - (i - low) / (high - low if high != low else 0.001) for i in range(n)]
        keep = [min(max(share, 0.0), 1.0) for share in keep]
        return [f * (k + (1 - k) / self.factor) for f, k in zip(frequencies, keep, strict=True)]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RopeScaling | None":
        """Read `rope_scaling`, or `rope_parameters` without its rope_theta, of a Hugging Face config.json.

        Returns:
            None for the type "default".

        Raises:
            ValueError: a type that cannot be served, or a missing, unknown or impossible value.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"config: rope_scaling is {_shown(values)}; expected a table")
        values = dict(values)
        # Older files say type, and some say both.
        kind = values.pop("type", None)
        kind = values.setdefault("rope_type", kind)
        if kind == "default":
            return None
        if kind == "dynamic":
            raise ValueError(
                "rope_scaling: dynamic positions depend on how long a text becomes, so the same tokens would not "
                "have the same logits; within the original context the model is the same without rope_scaling"
            )
        if kind == "longrope":
            raise ValueError(
                "rope_scaling: longrope changes all positions when a text outgrows the original context, so the "
                f"same tokens would not have the same logits; expected one of {', '.join(get_args(RopeType))}"
            )
        scales = [values.pop(name, None) for name in ("mscale", "mscale_all_dim")]
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"rope_scaling: unknown field {_shown(name)}; expected {', '.join(known)}")
        if "factor" not in values:
            raise ValueError("rope_scaling: factor is missing")
        scaling = cls(**values)
        if all(scales) and scaling.attention_factor is None:
            try:
                above, below = (0.1 * float(scale) * math.log(scaling.factor) + 1 for scale in scales)
                return replace(scaling, attention_factor=above / below)
            except (TypeError, ValueError, ArithmeticError):
                raise ValueError("rope_scaling: expected mscale and mscale_all_dim to be numbers") from None
        return scaling


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer, in the words of `nn/transformer.py` and `core/src/model.cpp`.

    Args:
        vocab_size: tokens in the vocabulary.
        d_model: width of the residual stream.
        n_layers: transformer blocks.
        n_heads: query heads.
        n_kv_heads: key and value heads; divides n_heads.
        d_head: width of a head; even.
        d_ff: width of the gated feed-forward layer.
        max_seq_len: longest context in tokens.
        rope_theta: base of the rotary position angles; at least 1.
        rope_scaling: how positions beyond the original context are reached, or None.
        norm_eps: added to the mean square in every RMSNorm.
        activation: of the gate: "silu" (SwiGLU) or "relu2" (squared ReLU).
        sub_norm: RMSNorm before the o and the down projection.
        qk_norm: RMSNorm of every query and key head, before the rotary positions.
        qkv_bias: the q, k and v projections add a bias.
        tied_head: the head uses the embedding matrix.
        weights: scheme of the linear layers: "b1.58", "b1", or "dense" for a full-precision twin.
        layer_weights: scheme of each block, "b1.58" or "b1", where not all have the same; else empty.
        activations: quantiser of the linear layers' inputs: "a8", "a4", "a1", "a15" for models whose authors left them
            unquantised, "a4.8" (a4 for q, k, v, gate and up, a8 for down, the larger half of a8 for o), or "none"
            (dense only).
        hadamard: the inputs of o and down pass through a normalised Hadamard transform before they are quantised;
            their widths must be powers of two.
        scale: weights that share a scale: "tensor", "row" or a number of inputs.
        bos_token: id put before a prompt, or None.
        eos_tokens: ids that end a text.

    Raises:
        ValueError: values that do not fit together.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_ff: int
    max_seq_len: int = 512
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    activation: FfnActivation = "relu2"
    sub_norm: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    tied_head: bool = True
    weights: Weights = "b1.58"
    layer_weights: tuple[Weights, ...] = ()
    activations: Activations = "a8"
    scale: Literal["tensor", "row"] | int = "tensor"
    hadamard: bool = False
    bos_token: int | None = None
    eos_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "d_model",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "d_head",
            "d_ff",
            "max_seq_len",
        ):
            value = getattr(self, name)
            if type(value) is not int or not 0 < value < 2**24:
                raise ValueError(
                    f"config: {name} is {_shown(value)}; expected a whole number from 1 to 2^24 - 1"
                )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"config: n_kv_heads {self.n_kv_heads} does not divide n_heads {self.n_heads}")
        if self.d_head % 2:
            raise ValueError(f"config: d_head {self.d_head} is odd; rotary positions need pairs")
        for name, kind in (("activation", FfnActivation), ("weights", Weights), ("activations", Activations)):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise ValueError(
                    f"config: {name} is {_shown(value)}; expected one of {', '.join(get_args(kind))}"
                )
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 2.0**-126 <= value < 2.0**127
            ):
                raise ValueError(
                    f"config: {name} is {_shown(value)}; expected a positive number, not below 2^-126"
                )
        if self.rope_theta < 1:
            raise ValueError(f"config: rope_theta is {_shown(self.rope_theta)}; expected at least 1")
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise ValueError(
                f"config: rope_scaling is {_shown(self.rope_scaling)}; expected a RopeScaling or None"
            )
        for name in ("sub_norm", "qk_norm", "qkv_bias", "tied_head", "hadamard"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"config: {name} is {_shown(getattr(self, name))}; expected true or false")
        if (self.weights == "dense") != (self.activations == "none"):
            found = f"weights {self.weights} with activations {self.activations}"
            raise ValueError(f"config: {found}; dense weights go with activations none, and no others do")
        self._check_layer_weights()
        for name in ("o", "down") if self.hadamard else ():
            k = self.linear_shapes()[name][1]
            if k & (k - 1):
                raise ValueError(
                    f"config: hadamard with {k} inputs of {name}; expected a power of two: n_heads * d_head and d_ff"
                )
        self._check_scale()
        self._check_tokens()

    def _check_layer_weights(self) -> None:
        table = self.layer_weights
        if table == ():
            return
        if not isinstance(table, tuple) or any(scheme not in ("b1.58", "b1") for scheme in table):
            raise ValueError(
                f"config: layer_weights is {_shown(table)}; expected b1.58 or b1 for each layer: dense layers do not "
                "mix with others, whose inputs are rounded"
            )
        if len(table) != self.n_layers:
            raise ValueError(
                f"config: layer_weights has {len(table)} schemes; expected one for each of {self.n_layers} layers"
            )
        if self.weights == "dense":
            raise ValueError("config: layer_weights with weights dense; expected weights b1.58 or b1")
        if len(set(table)) == 1:
            raise ValueError(
                f"config: all of layer_weights are {table[0]}; expected two schemes, or weights {table[0]} and no table"
            )

    def _check_scale(self) -> None:
        if self.scale in ("tensor", "row"):
            return
        if type(self.scale) is not int or self.scale < 1 or self.scale % 16:
            raise ValueError(
                f"config: scale is {_shown(self.scale)}; expected 'tensor', 'row' or a multiple of 16 inputs"
            )
        for name, (_, k) in self.linear_shapes().items():
            if k % self.scale:
                raise ValueError(
                    f"config: scale group {_shown(self.scale)} does not divide the {k} inputs of {name}"
                )

    def _check_tokens(self) -> None:
        tokens = (*self.eos_tokens, *(() if self.bos_token is None else (self.bos_token,)))
        for token in tokens:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"config: special token {_shown(token)} is outside the vocabulary of {self.vocab_size}"
                )

    @property
    def label(self) -> str:
        """Bit widths of weights, activations and reference KV cache, as in "W1.58A8KV16"; of mixed weights the mean."""
        bits = {"b1.58": math.log2(3), "b1": 1, "dense": 16}
        table = self.layer_weights or (self.weights,)
        weights = f"{sum(bits[scheme] for scheme in table) / len(table):.3g}"
        activations = {"a15": "15", "a8": "8", "a4.8": "4.8", "a4": "4", "a1": "1", "none": "16"}[
            self.activations
        ]
        return f"W{weights}A{activations}KV16"

    def weights_of(self, name: str) -> Weights:
        """Scheme of a matrix or block by its canonical name; of embedding and head, where they are codes, `weights`."""
        if not self.layer_weights or not name.startswith("layers."):
            return self.weights
        return self.layer_weights[int(name.split(".")[1])]

    def input_quantizer(self, name: str) -> str:
        """Key in `quant.INPUT_QUANTIZERS` for the input of a linear layer."""
        return input_quantizer(self.activations, name)

    def rope_frequencies(self) -> list[float]:
        """Rotary angle of each pair of a head per position, theta^(-2 i / d_head) and scaled; used as float32."""
        frequencies = [math.pow(self.rope_theta, -2 * i / self.d_head) for i in range(self.d_head // 2)]
        return self.rope_scaling.stretch(frequencies, self.rope_theta) if self.rope_scaling else frequencies

    @property
    def rope_attention_factor(self) -> float:
        """What cosines and sines of the rotary angles are multiplied by; 1 unless yarn asks for more."""
        scaling = self.rope_scaling
        if scaling is None or scaling.rope_type != "yarn":
            return 1.0
        if scaling.attention_factor is None:
            return 0.1 * math.log(scaling.factor) + 1
        return scaling.attention_factor

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Name and [out, in] of the seven linear layers of a block, in the order in which they run."""
        q, kv = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        return {
            "q": (q, self.d_model),
            "k": (kv, self.d_model),
            "v": (kv, self.d_model),
            "o": (self.d_model, q),
            "gate": (self.d_ff, self.d_model),
            "up": (self.d_ff, self.d_model),
            "down": (self.d_model, self.d_ff),
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name and shape of every tensor of a checkpoint, in file order."""
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocab_size, self.d_model)}
        for i in range(self.n_layers):
            block: dict[str, tuple[int, ...]] = {"attn_norm": (self.d_model,), "ffn_norm": (self.d_model,)}
            if self.sub_norm:
                block |= {"attn_sub_norm": (self.n_heads * self.d_head,), "ffn_sub_norm": (self.d_ff,)}
            if self.qk_norm:
                block |= {"q_norm": (self.d_head,), "k_norm": (self.d_head,)}
            block |= self.linear_shapes()
            shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in block.items()}
            if self.qkv_bias:
                shapes |= {f"layers.{i}.{name}.bias": (block[name][0],) for name in ("q", "k", "v")}
        shapes["norm.weight"] = (self.d_model,)
        if not self.tied_head:
            shapes["head.weight"] = (self.vocab_size, self.d_model)
        return shapes

    def is_linear(self, name: str) -> bool:
        """Whether a canonical tensor name is one of the quantised linear layers."""
        parts = name.split(".")
        return len(parts) == 4 and parts[::3] == ["layers", "weight"] and parts[2] in self.linear_shapes()

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-ready values; what few models have, rope_scaling among them, only where it is set."""
        values = asdict(self)
        for name in ("rope_scaling", "qk_norm", "qkv_bias", "hadamard", "layer_weights"):
            if not values[name]:
                del values[name]
        for name in _TUPLES:
            if name in values:
                values[name] = list(values[name])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Build a config from JSON values.

        Raises:
            ValueError: a missing, unknown or impossible value.
        """
        known = {field.name: field for field in fields(cls)}
        for name in values:
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"config: unknown field {_shown(name)}{hint}")
        missing = [f.name for f in known.values() if f.default is MISSING and f.name not in values]
        if missing:
            raise ValueError(f"config: {', '.join(missing)} missing")
        values = dict(values)
        for name, items in _TUPLES.items():
            value = values.get(name, ())
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"config: {name} is {_shown(value)}; expected a list of {items}")
            values[name] = tuple(value)
        if values.get("rope_scaling") is not None:
            values["rope_scaling"] = RopeScaling.from_dict(values["rope_scaling"])
        return cls(**values)


def input_quantizer(activations: str, name: str) -> str:
    """Key in `quant.INPUT_QUANTIZERS` for the input of a linear layer of a model with these activations.

    Source: of a4.8, arXiv:2411.04965 section 2.2.
    """
    if activations != "a4.8":
        return activations
    return {"o": "a8-half", "down": "a8"}.get(name, "a4")
