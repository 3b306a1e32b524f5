"""The model that a run starts from: its tokenizer, its fingerprint, and float32 weights where it has codes.

    recipe = begin_with(build("stories"), "model.onebit", checkpoint, ["steps=1000"])
    model = first_model(checkpoint)

A packed model has lost the numbers behind its codes. Others that are rounded to the same codes and scales take their
place, so that training begins where the model stands; each is as far from another code as all of its kind.
"""

import hashlib
import json
from dataclasses import replace

import numpy as np

from onebit.checkpoint import BLOCK_ROWS, Checkpoint, Stored, Tensor, codes, holds_codes, rows
from onebit.config import ModelConfig
from onebit.engine.tokenizer import Tokenizer
from onebit.nn.transformer import Transformer
from onebit.packing import Float32, Int8
from onebit.quant import Granularity, dequantize, weight_groups
from onebit.train.data import Given
from onebit.train.recipe import Recipe, check_shape, check_vocabulary, given_vocabulary, override


def begin_with(recipe: Recipe, source: str, model: Checkpoint, overrides: list[str] | None = None) -> Recipe:
    """A recipe that goes on from a model, with its shape and tokenizer; a model of codes keeps its rounding.

    Args:
        recipe: schedule, data and options; of a full-precision model, also how it is rounded from now on.
        source: the model's name, as it was given.
        model: the model.
        overrides: "a.b=c" each.

    Raises:
        ValueError: a model without a tokenizer, with codes of another kind, or another shape than the model's.
    """
    given_tokenizer(model)
    config, chosen = model.config, recipe.model
    if config.weights == "dense":
        rounding = ("weights", "layer_weights", "activations")
        config = replace(config, **{name: getattr(chosen, name) for name in rounding})
    elif config.weights != chosen.weights:
        raise ValueError(
            f"{source} has {config.weights} weights, and the recipe {recipe.name} {chosen.weights} ones; "
            f"choose a recipe for {config.weights}"
        )
    data = replace(
        recipe.data,
        vocab_size=given_vocabulary(config.vocab_size),
        seq_len=min(recipe.data.seq_len, config.max_seq_len),
    )
    sha256 = fingerprint(model)
    changed = override(
        replace(recipe, model=config, data=data, init=source, init_sha256=sha256), overrides or []
    )
    check_shape(changed.model, config, "a run has that of the model it begins with")
    check_vocabulary(changed.data, data, "that of the model to begin with")
    if (changed.init, changed.init_sha256) != (source, sha256):
        raise ValueError("--set init: the model to begin with is named by --init")
    if changed.options.learned_scale:
        raise ValueError("options.learned_scale with a model to begin with; its scales are what they are")
    return changed


def given_tokenizer(model: Checkpoint) -> Given:
    """A model's tokenizer, and which of its tokens stand around a document.

    Raises:
        ValueError: none, one that cannot be read or does not fit the model, or no token that ends a text.
    """
    config, data = model.config, model.tokenizer
    if data is None:
        raise ValueError(
            "the model has no tokenizer, so texts cannot be given to it; expected one in its file or folder, or "
            "(llama2.c) tokenizer.bin or tok512.bin beside it"
        )
    n_tokens = Tokenizer(data).vocab_size
    if n_tokens > config.vocab_size:
        raise ValueError(
            f"the model's tokenizer goes up to token {n_tokens - 1}, its embedding has {config.vocab_size} rows; "
            f"expected a row for each: give the tokenizer that it was trained with"
        )
    if not config.eos_tokens:
        raise ValueError("the model names no token that ends a text; set eos_token_id in its config")
    begin = config.bos_token
    # Some begin a text with the token that ends the one before it.
    end = begin if begin in config.eos_tokens and begin is not None else config.eos_tokens[0]
    if end >= n_tokens:
        raise ValueError(f"the model's end token {end} is not among the {n_tokens} tokens of its tokenizer")
    return Given(data, None if begin == end else begin, end)


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of a model's config, tokenizer and every weight, whatever format they are in."""
    digest = hashlib.sha256(json.dumps(checkpoint.config.to_dict(), sort_keys=True).encode())
    digest.update(checkpoint.tokenizer or b"")
    for name in checkpoint.config.tensor_shapes():
        tensor = checkpoint.tensors[name]
        for begin in range(0, tensor.shape[0], BLOCK_ROWS):
            digest.update(np.ascontiguousarray(rows(name, tensor, begin, begin + BLOCK_ROWS)).data)
    return digest.hexdigest()


def first_model(model: Checkpoint) -> Transformer:
    """A model in PyTorch, all of whose weights learn; see `latent_master`."""
    is_foreign = any(isinstance(tensor, Stored) for tensor in model.tensors.values())
    head = "bf16" if is_foreign or model.head == "bf16" else "q8"
    return Transformer.from_checkpoint(latent_master(model), head)


def latent_master(checkpoint: Checkpoint) -> Checkpoint:
    """A float32 master that is rounded to the codes of a model, and to its scales but for their last bits.

    Args:
        checkpoint: of any kind, packed or from another format; float32 weights are kept as they are.

    Raises:
        ValueError: a damaged file, NaN, ...
    """
    tensors: dict[str, Tensor] = {
        name: _latent(name, checkpoint.tensors[name], checkpoint.config)
        for name in checkpoint.config.tensor_shapes()
    }
    return replace(checkpoint, tensors=tensors, sha256={})


def latent_weights(codes: Int8, scale: Float32, granularity: Granularity) -> Float32:
    """Weights whose codes and scales are given.

        w = code * scale / share of codes that are not 0, of those that share a scale

    The mean of |w| is the scale again. A group of zeros has the scale 1e-5 from then on, which multiplies nothing.

    Args:
        codes: int8 [out, in], ternary or binary.
        scale: float32 [1], [out] or [out, groups], multipliers.
        granularity: which weights share a scale.

    Returns:
        float32 [out, in].
    """
    share = np.abs(weight_groups(codes, granularity)).mean(-1, dtype=np.float64).reshape(scale.shape)
    return dequantize(codes, (scale / np.where(share > 0, share, 1)).astype(np.float32))


def _latent(name: str, tensor: Tensor, config: ModelConfig) -> Float32:
    if config.is_linear(name) and holds_codes(tensor):
        found, scale = codes(name, tensor, config)
        return latent_weights(found, scale, config.scale)
    return np.array(rows(name, tensor), np.float32)
