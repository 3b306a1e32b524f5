"""From a full-precision teacher to the student that training begins with: same shape, same tokenizer, rounded layers.

    config = student_config(teacher.config, "b1.58", "a8", "tensor", calibrated=True)
    student = make_student(teacher, config, tokens_BT)

Ternary models that are trained from nothing have sub-norms, and hardly a teacher has them. Put in, y = W x becomes

    y = W (x / rms(x) * gain)         rms(x) = sqrt(mean(x^2) + eps), over the inputs of a token

which is the same function only while rms(x) is the same for all tokens. It is not, so no gain is the identity; the
nearest one, in the sense of least squares over the tokens t of some text, is the same for every channel:

    gain = sum_t rms(x[t]) / tokens

A gain for each channel, fitted alike, came no nearer in loss. Where tokens differ much in size, as they do in larger
models, even this gain changes the function a lot, so sub-norms are off unless asked for; docs/log.md has the figures.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from onebit.checkpoint import Checkpoint, rows
from onebit.checkpoint import Tensor as Weights
from onebit.config import ModelConfig
from onebit.nn.transformer import Block, Transformer

SUB_NORMS = ("attn_sub_norm", "ffn_sub_norm")


def check_teacher(teacher: Checkpoint) -> None:
    """Refuse what cannot be distilled.

    Raises:
        ValueError: weights that are codes already, or no tokenizer.
    """
    if teacher.config.weights != "dense":
        raise ValueError(
            f"the teacher has {teacher.config.weights} weights; expected a full-precision model "
            f"(a model that is rounded already is trained further with: onebit train)"
        )
    if teacher.tokenizer is None:
        raise ValueError("the teacher has no tokenizer; texts cannot be given to it")


def student_config(teacher: ModelConfig, calibrated: bool, **rounding: Any) -> ModelConfig:
    """The shape of the teacher with rounded layers.

    Args:
        teacher: a dense config.
        calibrated: whether sub-norms are put in; those that the teacher has stay in any case.
        **rounding: weights, activations and scale, where they are not "b1.58", "a8" and "tensor".

    Raises:
        ValueError: values that do not fit together.
    """
    values = {"weights": "b1.58", "activations": "a8", "scale": "tensor"} | rounding
    return replace(teacher, sub_norm=teacher.sub_norm or calibrated, **values)


def make_student(teacher: Checkpoint, config: ModelConfig, tokens_BT: Tensor) -> Checkpoint:
    """The float32 master of a student at step 0: the teacher's weights, and sub-norms near the identity.

    Args:
        teacher: a dense model, in any format.
        config: from `student_config`.
        tokens_BT: some text, int64 [B, T], on which the gains of new sub-norms are fitted; see above.
    """
    tensors = to_master(teacher).tensors
    if config.sub_norm and not teacher.config.sub_norm:
        tensors = tensors | sub_norm_gains(teacher, tokens_BT)
    tensors = {name: tensors[name] for name in config.tensor_shapes()}
    return replace(teacher, config=config, tensors=tensors)


def to_master(teacher: Checkpoint) -> Checkpoint:
    """A dense model of any format as float32 arrays, which `Transformer.from_checkpoint` takes."""
    # Of a packed one a shortlist goes with the head.
    tensors: dict[str, Weights] = {
        name: np.array(rows(name, teacher.tensors[name]), np.float32)
        for name in teacher.config.tensor_shapes()
    }
    return replace(teacher, tensors=tensors)


def sub_norm_gains(teacher: Checkpoint, tokens_BT: Tensor) -> dict[str, Weights]:
    """Gains of sub-norms that change a model without them the least, by the formula above.

    Args:
        teacher: a dense model without sub-norms.
        tokens_BT: int64 [B, T]; each sequence is run once.

    Returns:
        float32 vectors by canonical name.
    """
    model = Transformer.from_checkpoint(to_master(teacher)).train()
    config = replace(teacher.config, sub_norm=True)
    fits: dict[str, _Fit] = {}
    for i, block in enumerate(model.layers):
        assert isinstance(block, Block)
        # From here on the model asks for its sub-norms, and finds the identity.
        block.config = config
        for name in SUB_NORMS:
            fit = fits[f"layers.{i}.{name}.weight"] = _Fit(config.norm_eps)
            setattr(block, name, fit)
    with torch.no_grad():
        for row_T in tokens_BT:
            model(row_T[None])
    return {name: fit.gain() for name, fit in fits.items()}


class _Fit(nn.Module):
    """The identity in the place of a sub-norm, which notes what the sub-norm would divide by."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.width = 0
        self.sizes: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Note x [..., n] and return it."""
        self.width = x.shape[-1]
        self.sizes.append((x.double().square().mean(-1) + self.eps).sqrt().flatten())
        return x

    def gain(self) -> np.ndarray:
        """Float32 [n], all alike."""
        return np.full(self.width, torch.cat(self.sizes).mean().item(), np.float32)
