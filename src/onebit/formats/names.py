"""What tensors are called: here, in Hugging Face models and in GGUF files. One table.

    from_hf("model.layers.3.mlp.up_proj.weight")        # "layers.3.up.weight"
    to_gguf("layers.3.up.weight")                       # "blk.3.ffn_up.weight"

Knows no shapes and no files.
"""

from typing import NamedTuple


class Names(NamedTuple):
    """Names of one kind of tensor, without ".weight" or ".bias", and for layers without their number.

    Args:
        here: the canonical one.
        hf: all that are met in Hugging Face models, first the one that is written.
        gguf: in GGUF files.
    """

    here: str
    hf: tuple[str, ...]
    gguf: str


TOP = (
    Names("embed", ("model.embed_tokens",), "token_embd"),
    Names("norm", ("model.norm",), "output_norm"),
    Names("head", ("lm_head",), "output"),
)
# The second name is that of the 1bitLLM models.
LAYER = (
    Names("attn_norm", ("input_layernorm",), "attn_norm"),
    Names("q", ("self_attn.q_proj",), "attn_q"),
    Names("k", ("self_attn.k_proj",), "attn_k"),
    Names("v", ("self_attn.v_proj",), "attn_v"),
    Names("q_norm", ("self_attn.q_norm",), "attn_q_norm"),
    Names("k_norm", ("self_attn.k_norm",), "attn_k_norm"),
    Names("attn_sub_norm", ("self_attn.attn_sub_norm", "self_attn.inner_attn_ln"), "attn_sub_norm"),
    Names("o", ("self_attn.o_proj",), "attn_output"),
    Names("ffn_norm", ("post_attention_layernorm",), "ffn_norm"),
    Names("gate", ("mlp.gate_proj",), "ffn_gate"),
    Names("up", ("mlp.up_proj",), "ffn_up"),
    Names("ffn_sub_norm", ("mlp.ffn_sub_norm", "mlp.ffn_layernorm"), "ffn_sub_norm"),
    Names("down", ("mlp.down_proj",), "ffn_down"),
)

_HERE, _HF, _GGUF = "layers.", "model.layers.", "blk."
_TO_HF = {names.here: names.hf[0] for names in TOP + LAYER}
_TO_GGUF = {names.here: names.gguf for names in TOP + LAYER}
_FROM_HF_TOP = {hf: names.here for names in TOP for hf in names.hf}
_FROM_HF_LAYER = {hf: names.here for names in LAYER for hf in names.hf}
_FROM_GGUF_TOP = {names.gguf: names.here for names in TOP}
_FROM_GGUF_LAYER = {names.gguf: names.here for names in LAYER}


def to_hf(name: str) -> str:
    """The Hugging Face name of a canonical tensor."""
    return _written(name, _TO_HF, _HF)


def to_gguf(name: str) -> str:
    """The GGUF name of a canonical tensor."""
    return _written(name, _TO_GGUF, _GGUF)


def from_hf(name: str) -> str | None:
    """The canonical name of a Hugging Face tensor that ends in .weight or .bias; None if there is none."""
    return _read(name, _HF, _FROM_HF_TOP, _FROM_HF_LAYER)


def from_gguf(name: str) -> str | None:
    """The canonical name of a GGUF tensor that ends in .weight or .bias; None if there is none."""
    return _read(name, _GGUF, _FROM_GGUF_TOP, _FROM_GGUF_LAYER)


def _written(name: str, table: dict[str, str], layers: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith(_HERE):
        return f"{table[stem]}.{kind}"
    _, number, part = stem.split(".")
    return f"{layers}{number}.{table[part]}.{kind}"


def _read(name: str, layers: str, top: dict[str, str], layer: dict[str, str]) -> str | None:
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in top:
        return f"{top[stem]}.{kind}"
    number, _, part = stem.removeprefix(layers).partition(".")
    # Digits of ASCII, and not so many that they are an attack.
    if not stem.startswith(layers) or part not in layer or not (number.isascii() and number.isdigit()):
        return None
    return f"{_HERE}{int(number)}.{layer[part]}.{kind}" if len(number) < 6 else None
