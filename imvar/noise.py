"""Gaussian noise from seeds and generators, drawn in diffusers' order: equal seeds give equal images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_int
from .errors import InputError, InputTypeError, invalid, short_repr
from .limits import MAX_SEED

Generators = torch.Generator | Sequence[torch.Generator]
Seeds = int | Sequence[int]


def randn(
    shape: Sequence[int],
    generator: Generators | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return standard normal noise, drawn on the generator's device; with a list, one generator per batch element."""
    if isinstance(generator, (list, tuple)) and len(generator) == 1:
        generator = generator[0]
    check_generator(generator, shape[0])
    if generator is None:
        return torch.randn(*shape, dtype=dtype, device=device)
    generators = [generator] if isinstance(generator, torch.Generator) else generator
    chunk_shape = (shape[0] // len(generators), *shape[1:])
    noise = torch.empty(shape, dtype=dtype, device=device)  # first, so that a lack of memory shows at once
    for chunk, g in zip(noise.split(chunk_shape[0]), generators, strict=True):
        chunk.copy_(torch.randn(*chunk_shape, generator=g, dtype=dtype, device=g.device))
    return noise


def per_image_seeds(seed: Seeds, batch: int) -> list[int]:
    """Return a seed per image: `seed` + k for image k, or the entries of a list with one seed per image."""
    if isinstance(seed, (list, tuple, range)):
        if len(seed) != batch:
            raise invalid(InputError, "seed", f"one integer, or one for each of {batch} images", f"{len(seed)} seeds")
        return [check_int(f"seed[{k}]", value, low=0, high=MAX_SEED) for k, value in enumerate(seed)]
    first = check_int("seed", seed, low=0, high=MAX_SEED - batch + 1)
    return list(range(first, first + batch))


def seed_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return a CPU generator per seed, so that the noise does not depend on the device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def check_generator(generator: Any, batch: int) -> None:
    """Check that `generator` is None, a generator, or a list with one per batch element."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, (list, tuple)) or not all(isinstance(g, torch.Generator) for g in generator):
        hint = "use torch.Generator().manual_seed(42), or seed=42"
        raise invalid(InputTypeError, "generator", "a torch.Generator or a list of them", short_repr(generator), hint)
    if len(generator) != batch:
        raise invalid(InputError, "generator", f"one generator, or {batch} for a batch of {batch}", str(len(generator)))
