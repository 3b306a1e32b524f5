"""Layers whose weights do not learn: codes or bfloat16 as a packed model holds them. Gradients pass to their inputs.

    layer = CodeLinear(codes, scale, "row")
    layer.take(tokens)          # rows of an embedding
    layer.logits(x)             # a head

Knows nothing of the transformer around them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebit.checkpoint import Tensor as Stored
from onebit.nn import ordered
from onebit.nn.bitlinear import code_linear, int15_activations
from onebit.packing import PackedTensor, bf16_rows, from_bf16, unpack
from onebit.quant import Granularity, dequantize


class CodeLinear(nn.Module):
    """A matrix w ~ codes * scale that stays as it is.

    Args:
        codes: int8 [n, k].
        scale: float32 [1], [n] or [n, groups].
        granularity: weights that share a scale.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, granularity: Granularity) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.granularity = granularity
        self.lora: nn.Module | None = None

    def take(self, tokens: Tensor) -> Tensor:
        """Rows as float32 [..., k], codes * scale. tokens: int64 [...]."""
        at = tokens.flatten()
        scale = self.scale if self.granularity == "tensor" else self.scale[at]
        return dequantize(self.codes[at].float(), scale).unflatten(0, tokens.shape)

    def logits(self, x: Tensor) -> Tensor:
        """As a head: the product with 15-bit activations. x: float32 [..., k] -> float32 [..., n]."""
        if self.training:
            # As masters are trained: sums of such codes are exact in float64 alone, which is slow.
            rows = dequantize(self.codes.float(), self.scale)
            return F.linear(int15_activations(x), rows).float()
        return code_linear(x, [(self.codes, self.scale)], "a15", self.granularity)[0]


class Bf16Linear(nn.Module):
    """A matrix of bfloat16 numbers that stays as it is.

    Args:
        weight: bfloat16 [n, k].
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.lora: nn.Module | None = None

    def take(self, tokens: Tensor) -> Tensor:
        """Rows as float32 [..., k]. tokens: int64 [...]."""
        return self.weight[tokens].float()

    def logits(self, x: Tensor) -> Tensor:
        """The product; in eval mode lane sums, as the engine's. x: float32 [..., k] -> float32 [..., n]."""
        if self.training:
            return F.linear(x, self.weight.float()).float()
        return ordered.head_bf16(x, self.weight.float())


def frozen(tensor: Stored, granularity: Granularity) -> CodeLinear | Bf16Linear:
    """The layer of a packed matrix.

    Args:
        tensor: a PackedTensor.
        granularity: weights that share a scale; see `onebit.checkpoint.granularity`.
    """
    assert isinstance(tensor, PackedTensor)
    n, k = tensor.shape
    if tensor.encoding == "bf16":
        values = from_bf16(bf16_rows(tensor)[:n, :k])
        return Bf16Linear(torch.from_numpy(values).bfloat16())
    codes = torch.from_numpy(unpack(tensor.data, tensor.encoding, tensor.shape))
    return CodeLinear(codes, torch.tensor(tensor.scale), granularity)
