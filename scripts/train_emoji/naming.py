"""Teacher and judge: each learns to name drawings, whoever drew them.

The teacher learns every character outside what is held out, since telling 1,300 things apart teaches it how vendors
differ; the judge knows only the model's concepts and the unseen ones, from its own seed and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_emoji.catalogue import codes
from train_emoji.drawings import Drawings
from train_emoji.loop import Job
from train_emoji.networks import Namer, top
from train_emoji.views import view

FLUENT = 0.5  # weight of each of the two Fluent styles, whose shapes are the same


class Pairs:
    """Draws two vendors' drawings of one character, the given characters in `share` of all draws."""

    def __init__(
        self, drawings: Drawings, concepts: Sequence[str], preferred: list[str], share: float, device: torch.device
    ):
        self.images, self.share, self.device = drawings.images.to(device), share, device
        place = {code: i for i, code in enumerate(concepts)}
        labels = np.array([place[one] for one in drawings.codes])
        weights = np.where(np.char.startswith(drawings.styles, "fluent"), FLUENT, 1.0)
        most = np.bincount(labels).max()
        self.members = torch.zeros(len(concepts), most, dtype=torch.long)  # drawings of each concept, and their weights
        self.weights = torch.zeros(len(concepts), most)
        for i in range(len(concepts)):
            (mine,) = np.nonzero(labels == i)
            self.members[i, : len(mine)] = torch.from_numpy(mine)
            self.weights[i, : len(mine)] = torch.from_numpy(weights[mine]).float()
        self.members, self.weights = self.members.to(device), self.weights.to(device)
        self.preferred = torch.tensor([place[one] for one in preferred], device=device)

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Concepts (n), and the places of two different drawings of each; where there is but one, the same twice."""
        some = self.preferred[torch.randint(len(self.preferred), (n,), generator=generator, device=self.device)]
        any_ = torch.randint(len(self.members), (n,), generator=generator, device=self.device)
        chosen = torch.rand(n, generator=generator, device=self.device) < self.share
        concept = torch.where(chosen, some, any_)
        two = torch.multinomial(self.weights[concept] + 1e-9, 2, generator=generator)
        two = torch.where(self.weights[concept].gather(1, two) > 0, two, two[:, :1])
        first, second = self.members[concept].gather(1, two).unbind(1)
        return concept, first, second


def contrast(one: Tensor, other: Tensor, concept: Tensor, scale: float = 12.0) -> Tensor:
    """InfoNCE (arXiv:1807.03748, equation 4) between two vendors, both ways; equal concepts are not set apart."""
    scores = one @ other.T * scale
    same = (concept[:, None] == concept[None]) & ~torch.eye(len(concept), dtype=torch.bool, device=concept.device)
    scores = scores.masked_fill(same, -torch.inf)
    target = torch.arange(len(concept), device=concept.device)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def job(
    name: str,
    drawings: Drawings,
    preferred: list[str],
    check: Drawings,
    device: torch.device,
    *,
    width: int = 32,
    share: float = 0.5,
    batch: int = 128,
) -> Job:
    """To name all that is drawn, above all the preferred characters; `check` is what it is looked at on, of these."""
    concepts, ours = sorted(set(drawings.codes.tolist())), codes(preferred)
    model = Namer(concepts, width)
    pairs = Pairs(drawings, concepts, ours, share, device)
    shown, labels = check.rgb().to(device), torch.tensor([ours.index(one) for one in check.codes], device=device)

    def loss(generator: torch.Generator) -> Tensor:
        concept, first, second = pairs.draw(batch // 2, generator)
        seen = torch.cat([view(pairs.images[first], generator), view(pairs.images[second], generator)])
        embedding = model.embedding(seen)
        scores = embedding @ model.table().T * model.scale
        named = F.cross_entropy(scores, concept.repeat(2), label_smoothing=0.1)
        return named + 0.5 * contrast(*embedding.chunk(2), concept)

    def look(model: nn.Module) -> dict[str, float]:
        scores = model(shown, ours)
        return {"top-1": top(scores, labels, 1), "top-5": top(scores, labels, 5)}

    return Job(name, model, loss, batch, rate=2e-3, decay=0.05, look=look, look_every=60)
