"""Products of 8-bit integers on a CPU (arXiv:1712.05877), by oneDNN's kernels, which PyTorch has for its own compiler.

A weight has a scale for each output channel. An input is quantized in each call, each sample of a batch with a scale
and a zero point of its own, so that no sample depends on the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

UINT8_RANGE = 254.999  # of inputs; with 255 the largest value could round to 256, which wraps to 0
MAX_INT8 = 127  # of weights
MIN_SCALE = 1e-30  # whose inverse float32 represents
ELEMENTS_PER_PASS = 2**18  # of an input, which fit into the cache as float32
ZERO_POINT = 1  # any but 0, for which oneDNN would pack a weight of a convolution differently


class Int8Weight(NamedTuple):
    """A quantized weight in oneDNN's layout, and the scales (m,) by which to multiply its rows back."""

    packed: Tensor
    scales: Tensor
    zero_points: Tensor


class Geometry(NamedTuple):
    """The arguments of a convolution beside its weights."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight (m, ...) as int8, and the scale of each output channel (m,), float32."""
    rows = weight.flatten(1).float().contiguous()  # oneDNN takes no strides
    scales = rows.abs().amax(dim=1).clamp(min=1e-12) / MAX_INT8
    return (rows / scales[:, None]).round_().to(torch.int8).view(weight.shape), scales


def quantize_sample(x: Tensor) -> tuple[Tensor, float, int]:
    """Return x as uint8, a scale and a zero point: x is about scale * (uint8 - zero point).

    For an x that is not finite the scale is NaN, and so is the output of a layer.
    """
    low, high = (float(bound) for bound in torch.aminmax(x))
    scale = max((max(high, 0.0) - min(low, 0.0)) / UINT8_RANGE, MIN_SCALE)  # NaN stays NaN
    out = x.new_empty(x.shape, dtype=torch.uint8)
    if not scale < math.inf:
        return out.zero_(), math.nan, 0
    zero_point = round(-min(low, 0.0) / scale)
    for part, out_part in zip(x.flatten().split(ELEMENTS_PER_PASS), out.view(-1).split(ELEMENTS_PER_PASS), strict=True):
        out_part.copy_(torch.add(zero_point + 0.5, part.float(), alpha=1 / scale))  # rounds, as it cuts off fractions
    return out, scale, zero_point


def join_samples(samples: list[Tensor]) -> Tensor:
    return samples[0] if len(samples) == 1 else torch.cat(samples)


def pack_linear(weight: Tensor) -> Int8Weight:
    """Quantize the weight (m, n) of a linear layer."""
    quantized, scales = quantize_channels(weight)
    return Int8Weight(torch.ops.onednn.qlinear_prepack(quantized, None), scales, zeros_like_int32(scales))


def pack_conv(weight: Tensor, geometry: Geometry) -> Int8Weight:
    """Quantize the weight (m, n, k, k) of a convolution."""
    quantized, scales = quantize_channels(weight)
    packed = torch.ops.onednn.qconv_prepack(quantized, scales, 1.0, ZERO_POINT, *geometry, None)
    return Int8Weight(packed, scales, zeros_like_int32(scales))


def zeros_like_int32(scales: Tensor) -> Tensor:
    return torch.zeros_like(scales, dtype=torch.int32)


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """Multiply x (b, ..., n) by a weight (m, n)."""
    output = 1.0, 0, x.dtype, "none", [], ""

    def multiply(sample: Tensor) -> Tensor:
        return torch.ops.onednn.qlinear_pointwise(*quantize_sample(sample), *weight, bias, *output)

    return join_samples([multiply(sample) for sample in x.split(1)])


def int8_conv2d(x: Tensor, weight: Int8Weight, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolve x (b, n, h, w) with a weight (m, n, k, k). The output is channels-last."""
    output = 1.0, 0, x.dtype, "none", [], ""

    def convolve(sample: Tensor) -> Tensor:
        quantized, *affine = quantize_sample(sample)
        image = rearrange(quantized, "b h w c -> b c h w")
        return torch.ops.onednn.qconv2d_pointwise(image, *affine, *weight, bias, *geometry, *output)

    return join_samples([convolve(sample) for sample in rearrange(x, "b c h w -> b h w c").contiguous().split(1)])


@cache
def has_int8_kernels() -> bool:
    """Return whether the operators exist and compute what they should.

    On a processor without VNNI or AMX instructions, sums of two products of 8 bits are cut off at 16.
    """
    geometry = Geometry((1, 1), (0, 0), (1, 1), 1)
    with torch.device("cpu"), torch.no_grad():
        x, weight = (torch.ones(n, 64, 3, 3, dtype=torch.float32) for n in (1, 16))
        try:
            conv = int8_conv2d(x, pack_conv(weight, geometry), None, geometry)
            linear = int8_linear(x[..., 0, 0], pack_linear(weight[..., 0, 0]), None)
        except (AttributeError, RuntimeError, TypeError):
            return False
    return bool((conv.round() == 64 * 9).all() and (linear.round() == 64).all())
