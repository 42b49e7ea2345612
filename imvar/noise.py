"""Fresh noise, drawn as diffusers draws it, so that equal seeds give equal pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_int
from .errors import InputError, InputTypeError, short_repr

Generators = torch.Generator | Sequence[torch.Generator]
Seeds = int | Sequence[int]
MAX_SEED = 2**63 - 1


def randn(
    shape: Sequence[int],
    generator: Generators | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
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
    noise = torch.empty(shape, dtype=dtype, device=device)  # at once, so that too much of it is refused at once
    for rows, g in zip(noise.split(part[0]), generators, strict=True):
        rows.copy_(torch.randn(*part, generator=g, dtype=dtype, device=g.device))
    return noise


def per_image_seeds(seed: Seeds, batch: int) -> list[int]:
    """The seed of each of a batch: `seed` + k for the k-th, or `seed` itself where it is a list of one each.

    Raises `InputTypeError` for other than whole numbers, `InputError` for one out of 0..2^63 - 1 or a wrong number.
    """
    if isinstance(seed, (list, tuple, range)):
        if len(seed) != batch:
            raise InputError(f"seed: {len(seed)} came for a batch of {batch}; one, or one each, would do", key="seed")
        return [check_int(f"seed[{k}]", one, low=0, high=MAX_SEED) for k, one in enumerate(seed)]
    first = check_int("seed", seed, low=0, high=MAX_SEED - batch + 1)
    return list(range(first, first + batch))


def seed_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """A generator for each seed, on the CPU, so that every device gets the same noise."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def check_generator(generator: Any, batch: int) -> None:
    """One generator, or one for each of a batch, or None."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, (list, tuple)) or not all(isinstance(one, torch.Generator) for one in generator):
        raise InputTypeError(
            f"generator={short_repr(generator)}: torch.Generator().manual_seed(42), or a list of them, would do; or seed=42"
        )
    if len(generator) != batch:
        raise InputError(f"generator: {len(generator)} came for a batch of {batch}; one, or one each, would do")
