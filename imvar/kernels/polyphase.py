"""Nearest-neighbour upsampling by 2 fused with a 3x3 convolution, by polyphase decomposition.

Each of the four output phases (even and odd rows and columns) is a 2x2 convolution of the input: 16 multiplications
in place of 36, equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_zero_padded(conv: nn.Conv2d) -> bool:
    """Return whether a convolution is fully described by its kernel, bias and zero padding."""
    return conv.padding_mode == "zeros" and "_conv_forward" not in vars(conv) and isinstance(conv.padding, tuple)


def is_same_3x3(conv: nn.Conv2d) -> bool:
    """Return whether a convolution is zero-padded, 3x3, ungrouped, and keeps the image size."""
    form = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    return is_zero_padded(conv) and form == ((3, 3), (1, 1), (1, 1), (1, 1), 1)


def phase_kernels(weight: Tensor) -> list[list[Tensor]]:
    """Fold a kernel (d, c, 3, 3) into 2x2 kernels for [even, odd] rows of [even, odd] columns.

    Taps that read the same input pixel are summed, in float32.
    """
    return [[kernel.to(weight.dtype) for kernel in fold_taps(rows, dim=3)] for rows in fold_taps(weight.float(), dim=2)]


def fold_taps(kernel: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    before, center, after = kernel.unbind(dim)
    return torch.stack([before, center + after], dim), torch.stack([before + center, after], dim)


def upsample_conv_by_phases(x: Tensor, kernels: Sequence[Sequence[Tensor]], bias: Tensor | None, out: Tensor) -> Tensor:
    """Upsample x (b, c, h, w) by 2 and convolve, into `out` (b, d, 2h, 2w)."""
    for row, kernels_of_row in enumerate(kernels):
        for column, kernel in enumerate(kernels_of_row):
            phase = F.conv2d(x, kernel, bias, padding=1)  # one row and one column too many
            phase = phase[:, :, row:, column:]
            out[:, :, row::2, column::2] = phase[:, :, : x.shape[2], : x.shape[3]]
    return out
