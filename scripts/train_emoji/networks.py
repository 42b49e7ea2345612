"""A small convolutional classifier of drawings: the encoder's teacher and, with another seed, the judge."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stage(nn.Module):
    """A stride-2 convolution and a residual convolution."""

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


class Classifier(nn.Module):
    """Classify RGB (b, 3, 64, 64) in [0, 1] by the cosine of a unit-norm embedding with that of each concept.

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
        """Return the unit-norm embeddings (n, 128) of these concepts, by default of all."""
        table = F.normalize(self.concepts, dim=-1)
        return table if among is None else table[[self.names.index(name) for name in among]]

    def forward(self, rgb: Tensor, among: Sequence[str] | None = None) -> Tensor:
        """Return scaled cosines (b, n) with each of these concepts."""
        return self.embedding(rgb) @ self.table(among).T * self.scale


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Return for each row how many classes score higher than the label: 0 is top-1, below 5 top-5."""
    return (scores > scores.gather(1, labels[:, None])).sum(1)


def top(scores: Tensor, labels: Tensor, k: int) -> float:
    return float((ranks(scores, labels) < k).float().mean())
