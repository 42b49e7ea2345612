"""Convolution by 3x3 with fewer multiplications: F(2x2, 3x3) of arXiv:1509.09308, and its like for enlarged pictures.

Both are exact but for rounding, about twice that of the usual way. Pictures are b h w c here, and a product is a
linear layer: (..., c) by a matrix (d, c) and a bias (d,) or None to (..., d), as a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

MatMul = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Filters = Sequence[Sequence[Tensor]]

MAX_PIXELS_PER_MATMUL = (
    2048  # that a product takes at a time: enough to be quick, few enough to stay near the processor
)
MAX_CHANNELS_PER_TRANSFORM = 64  # whose kernels are blended at a time, likewise


def transform_along_both_axes(weight: Tensor, blend: Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]) -> Tensor:
    """A kernel d c 3 3 blended along its rows, then along its columns: n n d c."""

    def both_ways(weight: Tensor) -> Tensor:
        rows = torch.stack(list(blend(*weight.permute(2, 3, 0, 1).contiguous())))
        return torch.stack(list(blend(*rows.unbind(1))), dim=1)

    return torch.cat([both_ways(part) for part in weight.split(MAX_CHANNELS_PER_TRANSFORM)], dim=2)


def padded_strips(x: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    """x, b h w c, some rows at a time: the first one's number, and they with a pixel more all around, 0 outside x."""
    n, h, w, c = x.shape
    for top in range(0, h, rows):
        first, last = max(top - 1, 0), min(top + rows + 1, h)
        block = x.new_empty(n, min(rows, h - top) + 2, w + 2, c)
        block[:, 0], block[:, -1], block[:, :, 0], block[:, :, -1] = 0, 0, 0, 0
        block[:, first + 1 - top : last + 1 - top, 1:-1] = x[:, first:last]
        yield top, block


# F(2x2, 3x3): A^T [G g G^T * B^T d B] A, equation 8, one dimension after the other


def transform_filter(weight: Tensor) -> Tensor:
    """G g G^T: 4 4 d c."""
    return transform_along_both_axes(weight, lambda a, b, c: (a, (a + c + b) / 2, (a + c - b) / 2, c))


def winograd_conv2d(x: Tensor, matrices: Filters, bias: Tensor | None, product: MatMul) -> Tensor:
    """b h w c to b h w d, h and w even: 16 products of a quarter of the pixels each, in place of 9 of all."""
    n, h, w, _ = x.shape
    made = x.new_empty(n, h, w, matrices[0][0].shape[0])
    for top, block in padded_strips(x, 2 * max(2 * MAX_PIXELS_PER_MATMUL // (n * w), 1)):
        products = [
            [
                product(tile, matrix, bias if i == j == 1 else None)  # whose part in all four pixels is 1
                for j, (tile, matrix) in enumerate(zip(transform_data(band, dim=2), line, strict=True))
            ]
            for i, (band, line) in enumerate(zip(transform_data(block, dim=1), matrices, strict=True))
        ]
        upper, lower = zip(*(inverse_transform(*column) for column in zip(*products, strict=True)), strict=True)
        for side, (a, b, c, d) in enumerate((upper, lower)):
            line = made[:, top + side : top + block.shape[1] - 2 : 2]
            torch.add(a.add_(b), c, out=line[:, :, 0::2])
            torch.sub(b.sub_(c), d, out=line[:, :, 1::2])
    return made


def transform_data(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """B^T d: of every four in a row along `dim`, each two further than the last, four blends."""
    a, b, c, d = (x[(slice(None),) * dim + (slice(i, x.shape[dim] - 3 + i, 2),)] for i in range(4))
    return a - c, b + c, c - b, b - d


def inverse_transform(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """A^T m: of four products, two pixels side by side; made in the place of the first two."""
    return a.add_(b).add_(c), b.sub_(c).sub_(d)


# Every pixel repeated to 2x2, then convolved: what a flat field would give, and corrections where neighbours differ


def transform_upsample_filter(weight: Tensor) -> Tensor:
    """3 3 d c: for the step from the pixel before, for the pixel, and for the step to the pixel after."""
    return transform_along_both_axes(weight, lambda a, b, c: (-a, a + b + c, c))


def winograd_upsample_conv(x: Tensor, matrices: Filters, bias: Tensor | None, product: MatMul) -> Tensor:
    """b h w c to b 2h 2w d: 9 products of the small picture, in place of 36."""
    n, h, w, _ = x.shape
    made = x.new_empty(n, 2 * h, 2 * w, matrices[0][0].shape[0])
    for top, block in padded_strips(x, max(MAX_PIXELS_PER_MATMUL // (n * w), 1)):
        rows, down, right = block.shape[1] - 2, block.diff(dim=1), block[:, 1:-1].diff(dim=2)
        steps = (block[:, 1:-1, 1:-1], right), (down[:, :, 1:-1], down.diff(dim=2))
        parts = [
            [
                product(steps[i != 1][j != 1], matrix, bias if i == j == 1 else None)[:, i // 2 :, j // 2 :][
                    :, :rows, :w
                ]  # a step lies between two pixels, so there is one more of them
                for j, matrix in enumerate(line)
            ]
            for i, line in enumerate(matrices)
        ]
        for side in range(2):
            before, flat, after = (a + b for a, b in zip(parts[2 * side], parts[1], strict=True))
            line = made[:, 2 * top + side : 2 * (top + rows) : 2]
            torch.add(flat, before, out=line[:, :, 0::2])
            torch.add(flat, after, out=line[:, :, 1::2])
    return made
