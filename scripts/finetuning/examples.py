"""Training examples: an image, and all random numbers that its loss needs.

Everything random depends on the seed and the example's number in the whole training alone. So a run is the same on any
number of ranks, with any division of a step into micro-batches, and a run that resumes needs no state of a sampler.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Example = dict[str, Tensor]


class Examples(Dataset):
    """The examples of a training, by their number from its start: all images in one random order, then in another.

    `images` returns the tensors of an image by its index: pixels, or those of a bank. `latent_shape`: (c, h, w).
    `drop`: the share without an embedding, for classifier-free guidance (arXiv:2207.12598, algorithm 1).
    """

    def __init__(
        self, images: Any, latent_shape: tuple[int, ...], timesteps: int, seed: int, drop: float, shuffle: bool = True
    ):
        self.images, self.latent_shape, self.timesteps = images, latent_shape, timesteps
        self.seed, self.drop, self.shuffle = seed, drop, shuffle

    def __getitem__(self, number: int) -> Example:
        """Return the image's tensors with `noise` and `posterior_noise` (c, h, w), `timestep` and `is_dropped` ()."""
        generator = seeded(self.seed, 0, number)
        return {
            **self.images[self.index(number)],
            "noise": torch.randn(self.latent_shape, generator=generator),
            "posterior_noise": torch.randn(self.latent_shape, generator=generator),
            "timestep": torch.randint(self.timesteps, (), generator=generator),
            "is_dropped": torch.rand((), generator=generator) < self.drop,
        }

    def index(self, number: int) -> int:
        """Return the index of the image of an example."""
        epoch, place = divmod(number, len(self.images))
        return int(order(self.seed, epoch, len(self.images))[place]) if self.shuffle else place


def seeded(*numbers: int) -> torch.Generator:
    """Return a generator whose numbers depend on all of `numbers`."""
    seed = 0
    for number in numbers:
        seed = (seed * 0x9E3779B97F4A7C15 + number + 0x7F4A7C15) % 2**63  # the golden ratio, as hash functions mix
    return torch.Generator().manual_seed(seed)


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, count: int) -> Tensor:
    """Return the order of the images in an epoch."""
    return torch.randperm(count, generator=seeded(seed, 1, epoch))


def micro_batches(first_step: int, steps: int, batch: int, accumulate: int, rank: int, ranks: int) -> Iterator[range]:
    """Yield the numbers of the examples of each micro-batch of a rank, from a step on."""
    for micro_step in range(first_step * accumulate, steps * accumulate):
        start = (micro_step * ranks + rank) * batch
        yield range(start, start + batch)


def load_examples(
    examples: Examples, batches: Iterator[range] | list[range], workers: int, pin_memory: bool = False
) -> Iterator[Example]:
    """Yield the batches of examples with these numbers, read ahead by `workers` processes."""
    spawned: dict[str, Any] = {"multiprocessing_context": "spawn", "prefetch_factor": 2} if workers else {}
    yield from DataLoader(examples, batch_sampler=batches, num_workers=workers, pin_memory=pin_memory, **spawned)  # type: ignore[arg-type]
