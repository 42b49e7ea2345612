"""A small convolutional network that names drawings: the encoder's teacher, and, under another seed, the judge."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stage(nn.Module):
    """Half the side, then a residual refinement."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )
        self.refine = nn.Sequential(
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return x + self.refine(x)


class Namer(nn.Module):
    """RGB in [0, 1], b 3 64 64, to an embedding of length 1, whose cosines with each concept's own name the picture.

    `names` are the concepts' code points, sorted.
    """

    def __init__(self, names: Sequence[str], width: int = 32, embedding: int = 128, scale: float = 16.0):
        super().__init__()
        self.names = tuple(names)
        widths = [3, width, 2 * width, 3 * width, 4 * width]
        self.stages = nn.Sequential(*(Stage(*pair) for pair in pairwise(widths)))
        self.embed = nn.Linear(2 * widths[-1], embedding)
        self.concepts = nn.Parameter(torch.randn(len(names), embedding))
        self.scale = scale

    def embedding(self, rgb: Tensor) -> Tensor:
        h = self.stages(rgb * 2 - 1)
        return F.normalize(self.embed(torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=1)).float(), dim=-1)

    def table(self, among: Sequence[str] | None = None) -> Tensor:
        """The embeddings of these concepts (n, 128), or of all, of length 1."""
        table = F.normalize(self.concepts, dim=-1)
        return table if among is None else table[[self.names.index(name) for name in among]]

    def forward(self, rgb: Tensor, among: Sequence[str] | None = None) -> Tensor:
        """Scaled cosines (b, n) with each of these concepts."""
        return self.embedding(rgb) @ self.table(among).T * self.scale


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Of each row the number of concepts that score higher than the right one: 0 is top-1, below 5 top-5."""
    return (scores > scores.gather(1, labels[:, None])).sum(1)


def top(scores: Tensor, labels: Tensor, k: int) -> float:
    return float((ranks(scores, labels) < k).float().mean())
