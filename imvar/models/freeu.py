"""FreeU: rescale the backbone and the skip connections of the UNet's first two up blocks (arXiv:2309.11497)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ..checks import check_finite
from ..errors import InputError, invalid, short_repr


@dataclass(frozen=True)
class FreeU:
    """Amplifies the backbone and attenuates the lowest frequencies of the skip connections; also a merge of both.

    `b1`, `b2` scale half of the backbone's channels in up blocks 0 and 1 (equation 4 with a constant factor), `s1`,
    `s2` the lowest frequencies of their skip connections (equations 5 and 6); 1 changes nothing. Raises `InputError`
    for a factor that is not a positive number.
    """

    s1: float
    s2: float
    b1: float
    b2: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if (factor := check_finite(name, value)) <= 0:
                raise invalid(InputError, name, "a number above 0", short_repr(value))
            object.__setattr__(self, name, factor)

    def __call__(self, h: Tensor, skip: Tensor, block: int) -> Tensor:
        return torch.cat(self.rescale(h, skip, block), dim=1)

    def rescale(self, h: Tensor, skip: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Return the feature map (b, c, h, w) and the skip connection (b, d, h, w) of up block `block`, rescaled."""
        if block < 2:
            backbone_scale, skip_scale = ((self.b1, self.s1), (self.b2, self.s2))[block]
            scaled, rest = h.tensor_split([h.shape[1] // 2], dim=1)
            h = torch.cat([scaled * backbone_scale, rest], dim=1)
            skip = scale_lowest(skip, skip_scale)
        return h, skip


def scale_lowest(x: Tensor, factor: float) -> Tensor:
    """Multiply the frequencies -1 and 0 of both axes of x (b, c, h, w) by `factor`."""
    spectrum = torch.fft.fftn(x if x.dtype == torch.float64 else x.float(), dim=(-2, -1))  # which supports no half
    mask = torch.ones(spectrum.shape[-2:], device=x.device)
    for rows, columns in product((slice(0, 1), slice(-1, None)), repeat=2):  # a CUDA graph copies no indices to the GPU
        mask[rows, columns] = factor
    return torch.fft.ifftn(spectrum * mask, dim=(-2, -1)).real.to(x.dtype)
