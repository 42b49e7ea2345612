"""Faster CPU kernels, equal to PyTorch's up to rounding.

Inference only: PyTorch's own are used when gradients are enabled and under torch.compile or tracing. `linear` and
`upsample_conv` are also faster for a single call; kernels that need packed weights, or leave their output in PyTorch's
channels_last memory format, run only where a `PackedWeights` is passed: inside a run of a whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import polyphase, winograd
from .packed_weights import PackedWeights

MIN_MACS = 2**24  # multiplications per call below which calling oneDNN costs more than it saves
MIN_PIXELS_CHANNELS_LAST = 2048  # pixels per batch below which a convolution is bound by reading its weights
MAX_PIXELS_IM2COL = 128  # of the output per batch, above which copying each input pixel 9 times costs more
MIN_PIXELS_UPSAMPLE = 512  # pixels per batch below which transforming a kernel takes longer than it saves
MIN_CHANNELS_WINOGRAD = 64  # half the harmonic mean of input and output channels below which additions dominate
MAX_ELEMENTS_CONTIGUOUS = 2**18  # of a batch, up to which group norm is fastest in the contiguous format
MAX_PIXELS_PER_SUM = 2**13  # pixels per channel that are summed at once in group norm, to keep precision
DTYPES = (torch.float32, torch.bfloat16)


def is_plain_inference(x: Tensor) -> bool:
    """Return whether x is a CPU tensor of a supported dtype in eager inference without autocast."""
    return (
        x.is_cpu
        and type(x) in (Tensor, nn.Parameter)
        and x.dtype in DTYPES
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and not torch._C._are_functorch_transforms_active()
    )


@cache
def has_onednn_linear(dtype: torch.dtype) -> bool:
    """Return whether the operator, which PyTorch registers for its own compiler, exists and computes what it should."""
    with torch.device("cpu"):
        x, weight, bias = (torch.ones(shape, dtype=dtype) for shape in ((2, 3), (4, 3), (4,)))
    try:
        return bool((onednn_linear(x, weight, bias) == 4).all())
    except (AttributeError, RuntimeError, TypeError):
        return False


def onednn_available(x: Tensor) -> bool:
    return torch.backends.mkldnn.enabled and has_onednn_linear(x.dtype)  # type: ignore[attr-defined]


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x (..., n) by a weight (m, n); up to 1.5 times as fast as a BLAS not tuned for the processor."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# Layers


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear`."""
    supported = is_plain_inference(x) and weight.dtype == x.dtype and is_plain_inference(weight)
    large = supported and x.numel() * len(weight) >= MIN_MACS  # compared last, as a trace records comparisons of sizes
    return (onednn_linear if large and onednn_available(x) else F.linear)(x, weight, bias)


def conv2d(conv: nn.Conv2d, x: Tensor, packed: PackedWeights | None) -> Tensor:
    """Compute what `conv` does to x (b, c, h, w)."""
    supported = packed and is_plain_inference(x) and conv.weight.dtype == x.dtype and polyphase.is_zero_padded(conv)
    if not packed or not supported:
        return conv._conv_forward(x, conv.weight, conv.bias)
    if x.dtype == torch.float32 and winograd_pays(conv, x):
        return call_winograd(winograd.winograd_conv2d, winograd.transform_filter, conv, x, packed)
    if im2col_pays(conv, x):
        return im2col_conv2d(conv, x)
    return conv._conv_forward(x.contiguous(memory_format=fastest_format(x.shape)), conv.weight, conv.bias)


def add_conv_pays(conv: nn.Conv2d, x: Tensor, packed: PackedWeights | None) -> bool:
    """Return whether `add_conv` applies, and rounds less than a convolution and an addition, in the same time."""
    return bool(
        packed
        and x.dtype == conv.weight.dtype == torch.bfloat16
        and is_plain_inference(x)
        and polyphase.is_same_3x3(conv)
        and fastest_format(x.shape) == torch.channels_last
        and torch.backends.mkldnn.enabled  # type: ignore[attr-defined]
        and has_onednn_add_conv()
    )


def add_conv(conv: nn.Conv2d, x: Tensor, residual: Tensor) -> Tensor:
    """Compute residual + conv(x), rounded once: oneDNN adds before it rounds the sums of a convolution."""
    x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
    geometry = conv.padding, conv.stride, conv.dilation, conv.groups
    no_activation = None, [], ""
    return torch.ops.mkldnn._convolution_pointwise.binary(
        x, residual, conv.weight, conv.bias, *geometry, "add", 1.0, *no_activation
    )


@cache
def has_onednn_add_conv() -> bool:
    """Return whether oneDNN convolves in bfloat16, and PyTorch has the operator, which is for its own compiler."""
    with torch.device("cpu"), torch.no_grad():
        conv = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.bfloat16)
        nn.init.ones_(conv.weight)
        nn.init.ones_(conv.bias)  # type: ignore[arg-type]  # there is one
        x = torch.ones(1, 2, 1, 1, dtype=torch.bfloat16)
        try:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported() and bool((add_conv(conv, x, x) == 4).all())
        except (AttributeError, RuntimeError, TypeError):
            return False


def fastest_format(shape: Sequence[int]) -> torch.memory_format:
    """Return the memory format in which a convolution of an input (b, c, h, w) is the fastest."""
    n, _, h, w = shape
    return torch.contiguous_format if n * h * w < MIN_PIXELS_CHANNELS_LAST else torch.channels_last


def winograd_pays(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return whether F(2x2, 3x3) applies and is faster. (In half precision its additions would round too much.)"""
    n, c, h, w = x.shape
    return (
        polyphase.is_same_3x3(conv)
        and h % 2 == w % 2 == 0
        and n * h * w >= MIN_PIXELS_CHANNELS_LAST
        and c * conv.out_channels >= MIN_CHANNELS_WINOGRAD * (c + conv.out_channels)
    )


def im2col_pays(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return whether `im2col_conv2d` applies, and is faster because reading the weights takes most of the time."""
    n, c, h, w = x.shape
    pixels = n * (h // conv.stride[0]) * (w // conv.stride[1])
    return (
        conv.groups == 1
        and conv.dilation == (1, 1)
        and pixels <= MAX_PIXELS_IM2COL
        and c * conv.out_channels * pixels >= MIN_MACS
        and onednn_available(x)
        and conv.weight.is_contiguous()
    )


def im2col_conv2d(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Multiply the weights, as they are stored, by the pixels below each position of the kernel (im2col).

    oneDNN's convolutions first bring the weights into a layout of their own.
    """
    (rows, columns), (down, right), (pad_h, pad_w) = conv.kernel_size, conv.stride, map(int, conv.padding)
    x = F.pad(x, (pad_w, pad_w, pad_h, pad_h))
    windows = x.unfold(2, rows, down).unfold(3, columns, right)
    n, _, h, w = windows.shape[:4]
    pixels = rearrange(windows, "b c h w rows columns -> (c rows columns) (b h w)")
    weight, bias = conv.weight.flatten(1), conv.bias
    if bias is not None and x.dtype == torch.bfloat16:
        out = torch.addmm(bias[:, None], weight, pixels)  # rounds once
    else:
        out = onednn_linear(weight, pixels.T, None)
        out = out if bias is None else out.add_(bias[:, None])
    return rearrange(out, "d (b h w) -> b d h w", b=n, h=h, w=w).contiguous()


def call_winograd(function: Any, transform: Any, conv: nn.Conv2d, x: Tensor, packed: PackedWeights) -> Tensor:
    """Call a function of winograd.py on x (b, c, h, w), with the transformed filters kept for the run."""
    onednn = onednn_available(x)
    filters = packed.get(pack_filters, conv.weight, transform, onednn)
    out = function(rearrange(x, "b c h w -> b h w c"), filters, conv.bias, onednn_linear if onednn else F.linear)
    return rearrange(out, "b h w c -> b c h w")


def pack_filters(weight: Tensor, transform: Any, onednn: bool) -> list[list[Tensor]]:
    pack = torch.ops.mkldnn._reorder_linear_weight if onednn else torch.Tensor.contiguous
    return [[pack(matrix) for matrix in row] for row in transform(weight)]


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def group_norm(norm: nn.GroupNorm, x: Tensor, packed: PackedWeights | None) -> Tensor:
    """Compute what `norm` does to x (b, c, h, w).

    PyTorch's own kernel loses digits for a mean far from 0 in the channels_last format.
    """
    float32 = x.dtype == norm.weight.dtype == torch.float32
    if packed and float32 and is_plain_inference(x) and is_channels_last(x):
        if x.numel() > MAX_ELEMENTS_CONTIGUOUS:
            return channels_last_group_norm(norm, x)
        x = x.contiguous()
    # F.group_norm refuses groups of one value, which a batch of both halves of guidance would hide from it
    return torch.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, torch.backends.cudnn.enabled)


def channels_last_group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Take the statistics of parts of equal size and combine them."""
    b, c, h, w = x.shape
    n_parts = next(n for n in range(min(-(-h * w // MAX_PIXELS_PER_SUM), h), h + 1) if h % n == 0)
    parts = rearrange(x, "b c (n h) w -> (b n) c h w", n=n_parts).split(1)
    statistics = [s for part in parts for s in torch.batch_norm_update_stats(part, None, None, 0.0)]  # (c,) each
    means, variances = rearrange(torch.stack(statistics), "(b n s) (g c) -> s b g (n c)", b=b, s=2, g=norm.num_groups)
    mean = means.mean(dim=2, keepdim=True)
    variance = (variances + (means - mean) ** 2).mean(dim=2, keepdim=True)  # of groups: (b, g, 1)
    scale = norm.weight.view(1, norm.num_groups, -1) * (variance + norm.eps).rsqrt()
    shift = norm.bias.view(1, norm.num_groups, -1) - scale * mean
    return torch.addcmul(shift.reshape(b, c, 1, 1), x, scale.reshape(b, c, 1, 1))


# Nearest-neighbour upsampling by 2, then a 3x3 convolution: (b, c, h, w) to (b, d, 2h, 2w)


def fused_upsample_pays(conv: nn.Conv2d, x: Tensor, packed: PackedWeights | None) -> bool:
    """Return whether `upsample_conv` applies to a 3x3 convolution that keeps the size, and is faster."""
    min_pixels = MIN_PIXELS_UPSAMPLE / 4 if packed else MIN_PIXELS_UPSAMPLE
    supported = is_plain_inference(x) and conv.weight.dtype == x.dtype
    return supported and len(x) * x.shape[2] * x.shape[3] >= min_pixels


def upsample_conv(conv: nn.Conv2d, x: Tensor, packed: PackedWeights | None) -> Tensor:
    """Upsample and convolve with a quarter (float32) or less than half (bfloat16) of the multiplications."""
    if packed and x.dtype == torch.float32:
        return call_winograd(winograd.winograd_upsample_conv, winograd.transform_upsample_filter, conv, x, packed)
    size = len(x), conv.out_channels, 2 * x.shape[2], 2 * x.shape[3]
    if not packed:
        out = x.new_empty(size)
        return polyphase.upsample_conv_by_phases(x, polyphase.phase_kernels(conv.weight), conv.bias, out)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=fastest_format(size))
    x = x.contiguous(memory_format=fastest_format(x.shape))
    return polyphase.upsample_conv_by_phases(x, packed.get(polyphase.phase_kernels, conv.weight), conv.bias, out)
