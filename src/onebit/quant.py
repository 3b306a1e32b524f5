"""The definitions of every quantiser: binary and ternary weights, 8-, 4-, 1- and 15-bit activations.

Training, packing, tests and the C++ kernels all follow this file. It takes numpy arrays or torch tensors
and returns the same kind, and knows nothing of models, files or layouts.

    codes, scale = quantize_ternary(w)      # w ~ codes * scale

A scale is always a multiplier. Codes keep the dtype of the input and hold whole numbers. Ties round to even.
"""

from typing import Any, Literal

import numpy as np

# numpy.ndarray or torch.Tensor: this module must not import torch.
Array = Any
Granularity = Literal["tensor", "row"] | int

EPSILON = 1e-5

A8_LEVELS = 127.0
# 127 * 128: the largest value that splits into two signed bytes, hi * 128 + lo.
A15_LEVELS = 16256.0
A4_LEVELS = float(np.float32(7.0**0.5))


def weight_groups(w: Array, granularity: Granularity = "tensor") -> Array:
    """Reshape weights so that the values which share one scale lie along the last axis.

    Args:
        w: float32 [out, in].
        granularity: "tensor", "row", or the number of inputs that share a scale.

    Returns:
        w as [1, 1, out * in], [out, 1, in] or [out, in / group, group].

    Raises:
        ValueError: a group size that does not divide in, or an unknown granularity.
    """
    n, k = w.shape
    if granularity == "tensor":
        return w.reshape(1, 1, n * k)
    if granularity == "row":
        return w.reshape(n, 1, k)
    if not isinstance(granularity, int) or granularity < 1:
        raise ValueError(
            f"scale granularity {granularity!r}: expected 'tensor', 'row' or a positive group size"
        )
    if k % granularity:
        raise ValueError(f"group size {granularity} does not divide the {k} inputs; choose a divisor")
    return w.reshape(n, k // granularity, granularity)


def quantize_ternary(w: Array, granularity: Granularity = "tensor") -> tuple[Array, Array]:
    """Round weights to {-1, 0, +1} with one absmean scale per group (scheme b1.58).

        scale = max(mean(|w|), 1e-5)        codes = clip(round(w / scale), -1, 1)

    Args:
        w: float32 [out, in].
        granularity: "tensor", "row", or the number of inputs that share a scale.

    Returns:
        codes: [out, in] in {-1, 0, +1}.
        scale: [1], [out] or [out, in / group]; a multiplier: w ~ codes * scale.

    Raises:
        ValueError: see `weight_groups`.

    Source: arXiv:2402.17764 eq. 1-3; epsilon from its FAQ. The mean is taken in float64.
    """
    groups = weight_groups(w, granularity)
    scale = _mean(abs(groups)).clip(EPSILON, None)
    codes = (groups / scale).round().clip(-1, 1)
    return codes.reshape(w.shape), _scale_shape(scale, granularity)


def quantize_binary(w: Array, granularity: Granularity = "tensor") -> tuple[Array, Array]:
    """Round weights to {-1, +1} around their mean with one absmean scale per group (scheme b1).

        codes = +1 if w > mean(w) else -1        scale = max(mean(|w|), 1e-5)

    Args:
        w: float32 [out, in].
        granularity: "tensor", "row", or the number of inputs that share a scale.

    Returns:
        codes: [out, in] in {-1, +1}; a weight equal to the mean becomes -1.
        scale: [1], [out] or [out, in / group]; a multiplier.

    Raises:
        ValueError: see `weight_groups`.

    Source: arXiv:2310.11453 eq. 1-3 and 12. Means are taken in float64.
    """
    groups = weight_groups(w, granularity)
    scale = _mean(abs(groups)).clip(EPSILON, None)
    codes = (groups * 0 + 2) * (groups > _mean(groups)) - 1
    return codes.reshape(w.shape), _scale_shape(scale, granularity)


def dequantize(codes: Array, scale: Array) -> Array:
    """Expand weight codes to real values: codes * scale.

    Args:
        codes: [out, in].
        scale: [1], [out] or [out, groups].

    Returns:
        [out, in] in the dtype of scale.
    """
    n, k = codes.shape
    if scale.ndim == 2:
        return (codes.reshape(n, scale.shape[1], -1) * scale[:, :, None]).reshape(n, k)
    return codes * scale.reshape(-1, 1)


def quantize_a8(x: Array) -> tuple[Array, Array]:
    """Quantise activations to 8 bits per token by their largest magnitude.

        m = max(max|x|, 1e-5)        codes = clip(round(x * (127 / m)), -128, 127)        scale = m / 127

    Args:
        x: float32 [..., n].

    Returns:
        codes: [..., n], whole numbers in [-127, 127].
        scale: [..., 1]; a multiplier: x ~ codes * scale.

    Source: arXiv:2402.17764 FAQ (activation_quant).
    """
    largest = _absmax(x).clip(EPSILON, None)
    codes = (x * _over(A8_LEVELS, largest)).round().clip(-128, 127)
    return codes, largest / A8_LEVELS


def quantize_a4(x: Array) -> tuple[Array, Array]:
    """Quantise activations to 4 bits per token by their mean magnitude.

        b = max(mean|x|, 1e-5)       codes = clip(round(x * (sqrt(7) / b)), -8, 7)        scale = b / sqrt(7)

    Args:
        x: float32 [..., n].

    Returns:
        codes: [..., n], whole numbers in [-8, 7].
        scale: [..., 1]; a multiplier.

    Source: arXiv:2411.04965 eq. 3. The mean is a `lane_sum` divided by n.
    """
    mean = (lane_sum(abs(x)) / np.float32(x.shape[-1])).clip(EPSILON, None)
    codes = (x * _over(A4_LEVELS, mean)).round().clip(-8, 7)
    return codes, mean / A4_LEVELS


def quantize_a8_half(x: Array) -> tuple[Array, Array]:
    """Quantise activations to 8 bits per token and drop those below the median magnitude.

        codes = those of a8 where |x| >= t, else 0        t = the (n - n // 2)-th smallest of |x|, from 0

    Args:
        x: float32 [..., n].

    Returns:
        codes: [..., n], whole numbers in [-127, 127]; values equal to t stay, so the choice depends on no order.
        scale: [..., 1]; a multiplier.

    Source: arXiv:2411.04965 eq. 5-6, top-K of 50 % before the output projection.
    """
    codes, scale = quantize_a8(x)
    size = abs(x)
    place = x.shape[-1] - x.shape[-1] // 2
    return codes * (size >= _nth(size, min(place, x.shape[-1] - 1))), scale


def quantize_a1(x: Array) -> tuple[Array, Array]:
    """Binarise activations per token around zero.

        codes = +1 if x > 0 else -1        scale = max(mean|x|, 1e-5)

    Args:
        x: float32 [..., n].

    Returns:
        codes: [..., n] in {-1, +1}; zero becomes -1.
        scale: [..., 1]; a multiplier.

    The mean is a `lane_sum` divided by n.
    """
    scale = (lane_sum(abs(x)) / np.float32(x.shape[-1])).clip(EPSILON, None)
    return (x * 0 + 2) * (x > 0) - 1, scale


def quantize_a15(x: Array) -> tuple[Array, Array]:
    """Quantise activations to 15 bits per token, for heads and sensitive layers: two signed bytes hi * 128 + lo.

        m = max(max|x|, 1e-5)        codes = round(x * (16256 / m))        scale = m / 16256

    Args:
        x: float32 [..., n].

    Returns:
        codes: [..., n], whole numbers in [-16256, 16256].
        scale: [..., 1]; a multiplier.
    """
    largest = _absmax(x).clip(EPSILON, None)
    codes = (x * _over(A15_LEVELS, largest)).round().clip(-A15_LEVELS, A15_LEVELS)
    return codes, largest / A15_LEVELS


def quantize_rows(w: Array, bits: int) -> tuple[Array, Array]:
    """Quantise embedding or head rows to signed integers with one absmax scale per row.

        top = 2^(bits - 1) - 1        m = max(max|row|, 1e-5)        codes = round(row * (top / m))

    Args:
        w: float32 [rows, n].
        bits: 8 or 4.

    Returns:
        codes: [rows, n], whole numbers in [-top, top].
        scale: [rows]; a multiplier, m / top.

    Raises:
        ValueError: other bit widths.
    """
    if bits not in (4, 8):
        raise ValueError(f"{bits}-bit rows: expected 8 or 4")
    top = float(2 ** (bits - 1) - 1)
    largest = _absmax(w).clip(EPSILON, None)
    codes = (w * _over(top, largest)).round().clip(-top, top)
    return codes, (largest / top).reshape(-1)


def lane_sum(x: Array) -> Array:
    """Sum the last axis in the one order that every kernel follows.

    Value i goes to lane i mod 16, lanes add in ascending i, and the 16 lanes are combined pairwise:
    (l, l + 8), (l, l + 4), (l, l + 2), (l, l + 1). A short last block is padded with zeros.

    Args:
        x: float32 [..., n].

    Returns:
        float32 [..., 1].
    """
    n_padded = -(-x.shape[-1] // 16) * 16
    padded = _zeros(x, n_padded)
    padded[..., : x.shape[-1]] = x
    lanes = _zeros(x, 16)
    for start in range(0, n_padded, 16):
        lanes = lanes + padded[..., start : start + 16]
    for width in (8, 4, 2, 1):
        lanes = lanes[..., :width] + lanes[..., width:]
    return lanes


def quantize_weights(w: Array, scheme: str, granularity: Granularity) -> tuple[Array, Array]:
    """Quantise weights by the name of the scheme: "b1.58" (`quantize_ternary`) or "b1" (`quantize_binary`)."""
    if scheme == "b1.58":
        return quantize_ternary(w, granularity)
    if scheme == "b1":
        return quantize_binary(w, granularity)
    raise ValueError(f"weight scheme {scheme!r}: expected 'b1.58' or 'b1'")


ACTIVATION_QUANTIZERS = {"a15": quantize_a15, "a8": quantize_a8, "a4": quantize_a4, "a1": quantize_a1}
# Those of single projections too; see `ModelConfig.input_quantizer`.
INPUT_QUANTIZERS = {**ACTIVATION_QUANTIZERS, "a8-half": quantize_a8_half}


def _over(numerator: float, x: Array) -> Array:
    # torch evaluates number / tensor as a rounded reciprocal times the number: two roundings, not one.
    return (x * 0 + numerator) / x


def _mean(x: Array) -> Array:
    # float64, so that the result does not depend on the order in which a library adds.
    if isinstance(x, np.ndarray):
        return x.mean(axis=-1, keepdims=True, dtype=np.float64).astype(x.dtype)
    return x.double().mean(-1, keepdim=True).to(x.dtype)


def _absmax(x: Array) -> Array:
    if isinstance(x, np.ndarray):
        return abs(x).max(axis=-1, keepdims=True)
    return abs(x).amax(-1, keepdim=True)


def _nth(x: Array, place: int) -> Array:
    if isinstance(x, np.ndarray):
        return np.partition(x, place, axis=-1)[..., place : place + 1]
    return x.kthvalue(place + 1, dim=-1, keepdim=True).values


def _zeros(x: Array, width: int) -> Array:
    shape = (*x.shape[:-1], width)
    return np.zeros(shape, x.dtype) if isinstance(x, np.ndarray) else x.new_zeros(shape)


def _scale_shape(scale: Array, granularity: Granularity) -> Array:
    if isinstance(granularity, int):
        return scale.reshape(scale.shape[0], scale.shape[1])
    return scale.reshape(-1)
