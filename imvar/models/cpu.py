"""Quicker ways to the same answers on a CPU, up to rounding: each is asked by the layer that it is for.

None keeps anything between calls, none has gradients, and what is compiled or traced is left to whoever does that.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .told import ours

WORTH_IT = 2**24  # multiplications, below which the way to a kernel costs more than it saves
DTYPES = (torch.float32, torch.bfloat16)


def eager(x: Tensor) -> bool:
    """Whether x is computed with here and now, on the CPU, for its values alone."""
    return (x.is_cpu and type(x) in (Tensor, nn.Parameter) and x.dtype in DTYPES and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling())


@cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN's linear layer, which PyTorch keeps for its own compiler, is here and does what it should."""
    try:
        x, weight, bias = torch.ones(2, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype), torch.ones(4, dtype=dtype)
        return torch.equal(onednn_linear(x, weight, bias), F.linear(x, weight, bias))
    except (AttributeError, RuntimeError, TypeError):
        return False


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., n) by weight (m, n). A third to a half quicker than BLAS where that knows the processor less well."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, the quickest that is here."""
    if (x.numel() * len(weight) >= WORTH_IT and eager(x) and weight.dtype == x.dtype and eager(weight)
            and torch.backends.mkldnn.enabled and has_onednn(x.dtype)):  # type: ignore[attr-defined]
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def phases_pay(conv: nn.Module, x: Tensor) -> bool:
    """Whether `upsample_in_phases` would be quicker than to repeat pixels and convolve."""
    return eager(x) and len(x) * x.shape[2] * x.shape[3] >= 512 and type(conv) is nn.Conv2d and ours(conv)


def upsample_in_phases(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Every pixel repeated to 2x2, then convolved by 3x3: as four convolutions of the small picture by 2x2.

    b c h w -> b d 2h 2w. Each of the four makes every other pixel of every other row, with the weights summed that
    would have met the same pixel: 16 multiplications in place of 36.
    """
    h, w = x.shape[2:]
    made = x.new_empty(len(x), conv.out_channels, 2 * h, 2 * w)
    for row, rows in enumerate(halves(conv.weight.float(), dim=2)):  # summed in single precision, whatever they are
        for column, kernel in enumerate(halves(rows, dim=3)):
            phase = F.conv2d(x, kernel.to(x.dtype), conv.bias, padding=1)  # of which one more is made than is wanted
            made[:, :, row::2, column::2] = phase[:, :, row:row + h, column:column + w]
    return made


def halves(kernel: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """A side of 3 as two of 2, for either of two equal pixels: what meets the same pixel is summed."""
    before, here, after = kernel.unbind(dim)
    return torch.stack([before, here + after], dim), torch.stack([before + here, after], dim)
