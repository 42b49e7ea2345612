"""Quicker ways to the same answers on a CPU, up to rounding: each is asked by the layer that it is for.

Linear layers go to oneDNN, and pictures are enlarged with fewer multiplications. The rest is for runs (`kept.py`), in
which weights may be had in another form, and nobody watches how pictures lie in memory: pixel by pixel, PyTorch's
channels_last. None has gradients, and what is compiled or traced is left to whoever does that.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..models.stock import is_stock
from . import packed_weights as kept
from . import polyphase as phases
from . import winograd

MIN_MACS = 2**24  # multiplications, below which the way to a kernel costs more than it saves
MIN_PIXELS_CHANNELS_LAST = (
    512  # pixels of a batch: so few that to read the weights takes longer than to multiply by them
)
MIN_PIXELS_WINOGRAD = (
    2048  # pixels in a whole run, below which it takes longer to make 16 matrices of a kernel than they save
)
MIN_CHANNELS_WINOGRAD = (
    150  # channels, half the harmonic mean of those before and after: below, it takes longer to sum than to multiply
)
MAX_PIXELS_PER_SUM = 2**13  # pixels of a channel: more in one sum cost digits
DTYPES = (torch.float32, torch.bfloat16)


def is_plain_inference(x: Tensor) -> bool:
    """Whether x is computed with here and now, on the CPU, for its values alone."""
    return (
        x.is_cpu
        and type(x) in (Tensor, nn.Parameter)
        and x.dtype in DTYPES
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )  # type: ignore[attr-defined]


# oneDNN's layers, which PyTorch keeps for its own compiler


@cache
def has_onednn_ops(dtype: torch.dtype) -> bool:
    """Whether they are here and do what they should."""
    conv, x = nn.Conv2d(3, 4, 1, dtype=dtype), torch.ones(2, 3, 1, 1, dtype=dtype)
    weight, bias = torch.ones(4, 3, 1, 1, dtype=dtype), torch.ones(4, dtype=dtype)
    try:
        linear = onednn_linear(x.flatten(1), weight.flatten(1), bias)
        convolved = onednn_convolution(x, pack_conv_weight(weight, conv), bias, conv)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool((linear == 4).all() and (convolved == 4).all())


def onednn_available(x: Tensor) -> bool:
    return torch.backends.mkldnn.enabled and has_onednn_ops(x.dtype)  # type: ignore[attr-defined]


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., n) by weight (m, n). A third to a half quicker than BLAS where that knows the processor less well."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def onednn_convolution(x: Tensor, packed: Tensor, bias: Tensor | None, like: nn.Conv2d) -> Tensor:
    """x by a kernel that lies in memory as oneDNN wants it; otherwise it is moved there in every call."""
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *conv_args(like), "none", [], "")


def pack_conv_weight(weight: Tensor, like: nn.Conv2d) -> Tensor:
    padding, stride, dilation, groups = conv_args(like)
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups)


def conv_args(conv: nn.Conv2d) -> tuple[Any, Any, Any, int]:
    return conv.padding, conv.stride, conv.dilation, conv.groups


# Layers


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, the quickest that is here."""
    if (
        x.numel() * len(weight) >= MIN_MACS
        and is_plain_inference(x)
        and weight.dtype == x.dtype
        and is_plain_inference(weight)
        and onednn_available(x)
    ):
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def conv2d(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv` of x, the quickest way that is here."""
    run = (
        kept.active()
        if is_plain_inference(x) and conv.weight.dtype == x.dtype and phases.is_zero_padded(conv)
        else None
    )
    if run is None:
        return conv._conv_forward(x, conv.weight, conv.bias)
    if x.dtype == torch.float32 and winograd_pays(conv, x, run.calls):
        return winograd_conv(winograd.winograd_conv2d, winograd.transform_filter, conv, x, run)
    if x.dtype == torch.bfloat16 and onednn_available(x):
        return onednn_convolution(channels_last(x), run.get(pack_conv_weight, conv.weight, conv), conv.bias, conv)
    few = len(x) * x.shape[2] * x.shape[3] < MIN_PIXELS_CHANNELS_LAST
    return conv._conv_forward(x.contiguous() if few else channels_last(x), conv.weight, conv.bias)


def winograd_pays(conv: nn.Conv2d, x: Tensor, calls: int) -> bool:
    """Whether F(2x2, 3x3) can be used, and is quicker. (In half precision its sums would round too much.)"""
    n, c, h, w = x.shape
    return (
        phases.is_same_3x3(conv)
        and h % 2 == w % 2 == 0
        and n * h * w >= MIN_PIXELS_CHANNELS_LAST
        and calls * n * h * w >= MIN_PIXELS_WINOGRAD
        and c * conv.out_channels >= MIN_CHANNELS_WINOGRAD * (c + conv.out_channels)
    )


def winograd_conv(way: Any, matrices: Any, conv: nn.Conv2d, x: Tensor, run: kept.PackedWeights) -> Tensor:
    """One of Winograd's ways, b c h w, with the matrices that it needs of the kernel kept for the run."""
    fast = onednn_available(x)
    made = run.get(pack_filters, conv.weight, matrices, fast)
    pixels = way(rearrange(x, "b c h w -> b h w c"), made, conv.bias, onednn_linear if fast else F.linear)
    return rearrange(pixels, "b h w c -> b c h w")


def pack_filters(weight: Tensor, matrices: Any, fast: bool) -> list[list[Tensor]]:
    made = matrices(weight)
    pack = torch.ops.mkldnn._reorder_linear_weight if fast else torch.Tensor.contiguous
    return [[pack(matrix) for matrix in line] for line in made]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """`norm` of x; PyTorch's own loses the digits of a mean far from 0 where pictures lie pixel by pixel."""
    b, c, h, w = x.shape
    apart = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if not (apart and is_plain_inference(x) and kept.active() and x.dtype == norm.weight.dtype == torch.float32):
        return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    number = next(n for n in range(min(-(-h * w // MAX_PIXELS_PER_SUM), h), h + 1) if h % n == 0)  # parts of a size
    found = [
        torch.stack(torch.batch_norm_update_stats(part, None, None, 0.0))  # mean and variance: 2 c
        for one in x.split(1)
        for part in one.chunk(number, dim=2)
    ]
    means, variances = rearrange(torch.stack(found), "(b n) two (g c) -> two b g (n c)", b=b, g=norm.num_groups)
    mean = means.mean(dim=2, keepdim=True)
    variance = (variances + (means - mean) ** 2).mean(dim=2, keepdim=True)  # of groups, b g 1, as they are of a size
    scale = norm.weight.view(1, norm.num_groups, -1) * (variance + norm.eps).rsqrt()
    shift = norm.bias.view(1, norm.num_groups, -1) - scale * mean
    return torch.addcmul(shift.reshape(b, c, 1, 1), x, scale.reshape(b, c, 1, 1))


# Every pixel repeated to 2x2, then convolved by 3x3: b c h w -> b d 2h 2w


def fused_upsample_pays(conv: nn.Module, x: Tensor) -> bool:
    """Whether `enlarge` would be quicker than to repeat pixels and convolve."""
    return (
        is_plain_inference(x)
        and len(x) * x.shape[2] * x.shape[3]
        >= (MIN_PIXELS_CHANNELS_LAST if kept.active() is None else MIN_PIXELS_CHANNELS_LAST / 4)
        and isinstance(conv, nn.Conv2d)
        and is_stock(conv)
        and phases.is_same_3x3(conv)
        and conv.weight.dtype == x.dtype
    )


def upsample_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """With a quarter of the multiplications; in half precision with less than half, and no more rounding."""
    run = kept.active()
    if run and x.dtype == torch.float32:
        return winograd_conv(winograd.winograd_upsample_conv, winograd.transform_upsample_filter, conv, x, run)
    made = x.new_empty(len(x), conv.out_channels, 2 * x.shape[2], 2 * x.shape[3])
    if not run or not onednn_available(x):
        return phases.upsample_conv_by_phases(x, phases.phase_kernels(conv.weight), conv.bias, made)
    return phases.upsample_conv_by_phases(
        channels_last(x),
        run.get(pack_phase_kernels, conv.weight, conv),
        conv.bias,
        channels_last(made),
        lambda x, kernel, bias: onednn_convolution(x, kernel, bias, conv),
    )


def pack_phase_kernels(weight: Tensor, like: nn.Conv2d) -> list[list[Tensor]]:
    return [[pack_conv_weight(kernel, like) for kernel in line] for line in phases.phase_kernels(weight)]
