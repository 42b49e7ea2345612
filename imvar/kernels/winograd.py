"""Winograd's minimal filtering F(2x2, 3x3) (arXiv:1509.09308), and its analogue for upsampling by 2 and convolving.

Both equal the direct convolution up to about twice its rounding error. Images are channels-last, (b, h, w, c); a
`MatMul` is a linear layer: x (..., c), a weight (d, c) and a bias (d,) or None to a new tensor (..., d).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

MatMul = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Filters = Sequence[Sequence[Tensor]]

MAX_PIXELS_PER_MATMUL = 1024  # large enough for an efficient product, small enough for the cache and little memory
MAX_CHANNELS_PER_TRANSFORM = 64  # likewise


def transform_along_both_axes(weight: Tensor, transform: Callable[..., Sequence[Tensor]]) -> Tensor:
    """Apply a 1-D transform of 3 taps to n outputs to both axes of a kernel (d, c, 3, 3): (n, n, d, c)."""

    def both_axes(weight: Tensor) -> Tensor:
        rows = torch.stack(list(transform(*weight.permute(2, 3, 0, 1).contiguous())))
        return torch.stack(list(transform(*rows.unbind(1))), dim=1)

    return torch.cat([both_axes(chunk) for chunk in weight.split(MAX_CHANNELS_PER_TRANSFORM)], dim=2)


def padded_strips(x: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    """Yield x (b, h, w, c) in strips of `rows` rows: the index of the first, and the strip with a border of 1 pixel."""
    n, h, w, c = x.shape
    for top in range(0, h, rows):
        first, last = max(top - 1, 0), min(top + rows + 1, h)
        block = x.new_empty(n, min(rows, h - top) + 2, w + 2, c)
        block[:, 0], block[:, -1], block[:, :, 0], block[:, :, -1] = 0, 0, 0, 0
        block[:, first + 1 - top : last + 1 - top, 1:-1] = x[:, first:last]
        yield top, block


# F(2x2, 3x3): A^T [(G g G^T) * (B^T d B)] A, equation 8, one axis after the other


def transform_filter(weight: Tensor) -> Tensor:
    """Compute G g G^T: (4, 4, d, c)."""
    return transform_along_both_axes(weight, lambda a, b, c: (a, (a + c + b) / 2, (a + c - b) / 2, c))


def winograd_conv2d(x: Tensor, filters: Filters, bias: Tensor | None, matmul: MatMul) -> Tensor:
    """Convolve (b, h, w, c) to (b, h, w, d), h and w even: 16 products over a quarter of the pixels, in place of 9."""
    n, h, w, _ = x.shape
    out = x.new_empty(n, h, w, filters[0][0].shape[0])
    for top, block in padded_strips(x, 2 * max(2 * MAX_PIXELS_PER_MATMUL // (n * w), 1)):
        products = [
            [
                matmul(tile, weight, bias if i == j == 1 else None)  # this product enters all four pixels once
                for j, (tile, weight) in enumerate(zip(transform_data(band, dim=2), line, strict=True))
            ]
            for i, (band, line) in enumerate(zip(transform_data(block, dim=1), filters, strict=True))
        ]
        upper, lower = zip(*(inverse_transform(*column) for column in zip(*products, strict=True)), strict=True)
        for side, (a, b, c, d) in enumerate((upper, lower)):
            line = out[:, top + side : top + block.shape[1] - 2 : 2]
            torch.add(a.add_(b), c, out=line[:, :, 0::2])
            torch.sub(b.sub_(c), d, out=line[:, :, 1::2])
    return out


def transform_data(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute B^T d along `dim`: four combinations of every window of four, with stride 2."""
    a, b, c, d = (x[(slice(None),) * dim + (slice(i, x.shape[dim] - 3 + i, 2),)] for i in range(4))
    return a - c, b + c, c - b, b - d


def inverse_transform(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Compute A^T m: two neighbouring pixels from four products, in the memory of the first two."""
    return a.add_(b).add_(c), b.sub_(c).sub_(d)


# Upsampling by 2, then 3x3: the response to a constant image, plus corrections from differences of neighbours


def transform_upsample_filter(weight: Tensor) -> Tensor:
    """Filters (3, 3, d, c) for the difference to the previous pixel, the pixel, and the difference to the next one."""
    return transform_along_both_axes(weight, lambda a, b, c: (-a, a + b + c, c))


def winograd_upsample_conv(x: Tensor, filters: Filters, bias: Tensor | None, matmul: MatMul) -> Tensor:
    """Upsample (b, h, w, c) by 2 and convolve to (b, 2h, 2w, d): 9 products over the input, in place of 36."""
    n, h, w, _ = x.shape
    out = x.new_empty(n, 2 * h, 2 * w, filters[0][0].shape[0])
    for top, block in padded_strips(x, max(MAX_PIXELS_PER_MATMUL // (n * w), 1)):
        rows, down, right = block.shape[1] - 2, block.diff(dim=1), block[:, 1:-1].diff(dim=2)
        differences = (block[:, 1:-1, 1:-1], right), (down[:, :, 1:-1], down.diff(dim=2))
        parts = [
            [
                matmul(differences[i != 1][j != 1], weight, bias if i == j == 1 else None)[:, i // 2 :, j // 2 :][
                    :, :rows, :w
                ]  # there is one more difference than there are pixels
                for j, weight in enumerate(line)
            ]
            for i, line in enumerate(filters)
        ]
        for side in range(2):
            before, flat, after = (a + b for a, b in zip(parts[2 * side], parts[1], strict=True))
            line = out[:, 2 * top + side : 2 * (top + rows) : 2]
            torch.add(flat, before, out=line[:, :, 0::2])
            torch.add(flat, after, out=line[:, :, 1::2])
    return out
