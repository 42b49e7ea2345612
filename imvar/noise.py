"""Fresh noise, drawn as diffusers draws it, so that equal seeds give equal pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, InputTypeError

Generators = torch.Generator | Sequence[torch.Generator]


def randn(shape: Sequence[int], generator: Generators | None = None, *,
          dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
    """Standard normal noise, drawn on the generator's device; a list of generators draws one row each.

    Raises `InputTypeError` for what is no generator, `InputError` for a list of another length.
    """
    if isinstance(generator, (list, tuple)) and len(generator) == 1:
        generator = generator[0]
    check_generator(generator, shape[0])
    if generator is None:
        return torch.randn(*shape, dtype=dtype, device=device)
    generators = [generator] if isinstance(generator, torch.Generator) else generator
    part = (shape[0] // len(generators), *shape[1:])
    drawn = [torch.randn(*part, generator=g, dtype=dtype, device=g.device) for g in generators]
    return torch.cat(drawn).to(device)


def check_generator(generator: Any, batch: int) -> None:
    """One generator, or one for each of a batch, or None."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, (list, tuple)) or not all(isinstance(one, torch.Generator) for one in generator):
        raise InputTypeError(f"generator={generator!r}: torch.Generator().manual_seed(42), or a list of them, would do")
    if len(generator) != batch:
        raise InputError(f"generator: {len(generator)} came for a batch of {batch}; one, or one each, would do")
