"""Every pixel repeated to 2x2, then convolved by 3x3, as four convolutions of the small picture by 2x2.

Each makes every other pixel of every other row. 16 multiplications in place of 36, exact but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Conv = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x: b c h w, a kernel d c 2 2 or what was made of it, a bias (d,): to b d h+1 w+1, padded by 1 all around."""


def is_zero_padded(conv: nn.Conv2d) -> bool:
    """Whether a convolution is no more than its kernel and its bias, with zeros around."""
    return conv.padding_mode == "zeros" and "_conv_forward" not in vars(conv) and isinstance(conv.padding, tuple)


def is_same_3x3(conv: nn.Conv2d) -> bool:
    """Whether it is, by 3x3, and leaves the size as it is."""
    form = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    return is_zero_padded(conv) and form == ((3, 3), (1, 1), (1, 1), (1, 1), 1)


def padded_conv(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, kernel, bias, padding=1)


def phase_kernels(weight: Tensor) -> list[list[Tensor]]:
    """Those that make even and odd rows, of even and odd columns each.

    Of a kernel d c 3 3 those weights are summed, in single precision, that would meet the same pixel.
    """
    return [[kernel.to(weight.dtype) for kernel in fold_taps(rows, dim=3)] for rows in fold_taps(weight.float(), dim=2)]


def fold_taps(kernel: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    before, here, after = kernel.unbind(dim)
    return torch.stack([before, here + after], dim), torch.stack([before + here, after], dim)


def upsample_conv_by_phases(
    x: Tensor, kernels: Sequence[Sequence[Tensor]], bias: Tensor | None, made: Tensor, convolve: Conv = padded_conv
) -> Tensor:
    """b c h w to b d 2h 2w, which `made` has room for."""
    for row, line in enumerate(kernels):
        for column, kernel in enumerate(line):
            phase = convolve(x, kernel, bias)[:, :, row:, column:]  # one more than wanted
            made[:, :, row::2, column::2] = phase[:, :, : x.shape[2], : x.shape[3]]
    return made
