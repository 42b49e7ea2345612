"""Teacher and judge: classifiers of drawings across vendors.

The teacher is trained on every character that is not held out, since 1,300 classes teach it how vendors differ. The
judge has only the model's concepts and the unseen ones as classes, and its own seed and width.
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
from train_emoji.networks import Classifier, top
from train_emoji.views import view

FLUENT = 0.5  # weight of each of the two Fluent styles, whose shapes are the same


class Pairs:
    """Samples pairs of drawings of one character by two vendors, `preferred` characters with probability `share`."""

    def __init__(
        self, drawings: Drawings, concepts: Sequence[str], preferred: list[str], share: float, device: torch.device
    ):
        self.images, self.share, self.device = drawings.images.to(device), share, device
        index = {code: i for i, code in enumerate(concepts)}
        labels = np.array([index[point] for point in drawings.codes])
        weights = np.where(np.char.startswith(drawings.styles, "fluent"), FLUENT, 1.0)
        n_max = np.bincount(labels).max()
        self.members = torch.zeros(len(concepts), n_max, dtype=torch.long)  # indices of each concept's drawings
        self.weights = torch.zeros(len(concepts), n_max)
        for i in range(len(concepts)):
            (members,) = np.nonzero(labels == i)
            self.members[i, : len(members)] = torch.from_numpy(members)
            self.weights[i, : len(members)] = torch.from_numpy(weights[members]).float()
        self.members, self.weights = self.members.to(device), self.weights.to(device)
        self.preferred = torch.tensor([index[point] for point in preferred], device=device)

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return concepts (n,) and the indices of two drawings of each, equal if there is only one."""
        preferred = self.preferred[torch.randint(len(self.preferred), (n,), generator=generator, device=self.device)]
        any_ = torch.randint(len(self.members), (n,), generator=generator, device=self.device)
        is_preferred = torch.rand(n, generator=generator, device=self.device) < self.share
        concept = torch.where(is_preferred, preferred, any_)
        pair = torch.multinomial(self.weights[concept] + 1e-9, 2, generator=generator)
        pair = torch.where(self.weights[concept].gather(1, pair) > 0, pair, pair[:, :1])
        first, second = self.members[concept].gather(1, pair).unbind(1)
        return concept, first, second


def info_nce(first: Tensor, second: Tensor, concept: Tensor, scale: float = 12.0) -> Tensor:
    """Symmetric InfoNCE loss (arXiv:1807.03748, equation 4) between two vendors; equal concepts are not negatives."""
    scores = first @ second.T * scale
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
    """Train a classifier of all drawings, mostly of the `preferred` characters; `check` are drawings to evaluate on."""
    concepts, classes = sorted(set(drawings.codes.tolist())), codes(preferred)
    model = Classifier(concepts, width)
    pairs = Pairs(drawings, concepts, classes, share, device)
    rgb, labels = check.rgb().to(device), torch.tensor([classes.index(point) for point in check.codes], device=device)

    def loss(generator: torch.Generator) -> Tensor:
        concept, first, second = pairs.draw(batch // 2, generator)
        views = torch.cat([view(pairs.images[first], generator), view(pairs.images[second], generator)])
        embedding = model.embedding(views)
        scores = embedding @ model.table().T * model.scale
        classification = F.cross_entropy(scores, concept.repeat(2), label_smoothing=0.1)
        return classification + 0.5 * info_nce(*embedding.chunk(2), concept)

    def evaluate(model: nn.Module) -> dict[str, float]:
        scores = model(rgb, classes)
        return {"top-1": top(scores, labels, 1), "top-5": top(scores, labels, 5)}

    return Job(name, model, loss, batch, rate=2e-3, decay=0.05, evaluate=evaluate, evaluate_every=60)
