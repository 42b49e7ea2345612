"""FreeU: another way to merge skips into the UNet's upward path (arXiv:2309.11497)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_finite
from ..errors import InputError, short_repr


@dataclass(frozen=True)
class FreeU:
    """Strengthen the backbone and quieten the skips' low frequencies in the first two levels upward.

    `b1`, `b2` scale half of the backbone's channels (equation 4 with a constant factor), `s1`, `s2` the
    skips' lowest frequencies (equations 5 and 6). Raises `InputError` for a factor that is not a positive number.
    """

    s1: float
    s2: float
    b1: float
    b2: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if (number := check_finite(name, value)) <= 0:
                raise InputError(f"{name}={short_repr(value)}: a number above 0 would do; 1 changes nothing", key=name)
            object.__setattr__(self, name, number)

    def __call__(self, h: Tensor, skip: Tensor, level: int) -> Tensor:
        if level < 2:
            backbone, lowest = ((self.b1, self.s1), (self.b2, self.s2))[level]
            scaled, rest = h.tensor_split([h.shape[1] // 2], dim=1)
            h = torch.cat([scaled * backbone, rest], dim=1)
            skip = scale_lowest(skip, lowest)
        return torch.cat([h, skip], dim=1)


def scale_lowest(x: Tensor, factor: float) -> Tensor:
    """Multiply the frequencies around zero, from -1 up to 0 in both directions, by `factor`. x: b c h w."""
    waves = torch.fft.fftn(x if x.dtype == torch.float64 else x.float(), dim=(-2, -1))  # which knows no half
    mask = torch.ones(waves.shape[-2:], device=x.device)
    rows, columns = (torch.tensor([0, -1], device=x.device).remainder(n) for n in mask.shape)
    mask[rows[:, None], columns] = factor
    return torch.fft.ifftn(waves * mask, dim=(-2, -1)).real.to(x.dtype)
