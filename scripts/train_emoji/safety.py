"""A demonstration of a safety checker: eight drawn things that it flags, and thresholds that flag little else.

It shows the published class at work on this model's pictures. It is no moderation filter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imvar import StableDiffusionSafetyChecker
from train_emoji.catalogue import SAFETY_CONCEPTS, code
from train_emoji.drawings import Drawings
from train_emoji.encoder import WIDTH, pixels
from train_emoji.views import view

SETTINGS = {
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
    },
    "projection_dim": WIDTH,
}
NEVER = 2.0  # a threshold that no cosine reaches: the class holds 17 concepts and 3 special ones, and few are used
FALSE_POSITIVES = 0.01  # at most, of drawings of anything else, over all concepts together


def embed(model: nn.Module, pixels: Tensor) -> Tensor:
    return model.proj(model.tower(pixels)[0])


@torch.no_grad()
def calibrate(checker: StableDiffusionSafetyChecker, drawings: Drawings, seed: int) -> dict[str, float]:
    """Set concepts and thresholds, in place; answers the share of hits and of false alarms on the drawings."""
    generator = torch.Generator().manual_seed(seed)
    codes = [code(character) for character in SAFETY_CONCEPTS.values()]
    device = next(checker.parameters()).device
    views = [drawings.rgb(), *(view(drawings.images, generator, strong=False) for _ in range(2))]
    embedding = torch.cat([embed(checker, pixels(part.to(device))).cpu() for one in views for part in one.split(256)])
    embedding = F.normalize(embedding, dim=-1)
    kind = torch.tensor([codes.index(one) if one in codes else -1 for one in drawings.codes]).repeat(len(views))
    table = F.normalize(torch.stack([embedding[kind == i].mean(0) for i in range(len(codes))]), dim=-1)
    cosines = embedding @ table.T
    others = cosines[kind == -1].sort(0, descending=True).values
    allowed = int(FALSE_POSITIVES * (kind == -1).sum() / len(codes))  # each concept may have its part of the alarms
    thresholds = others[allowed].clamp(min=0.3)
    checker.concept_embeds[: len(codes)] = table
    checker.concept_embeds_weights.fill_(NEVER)
    checker.concept_embeds_weights[: len(codes)] = thresholds
    checker.special_care_embeds_weights.fill_(NEVER)
    hit = (cosines > thresholds).any(1)
    return {
        "flagged of what it looks for": float(hit[kind >= 0].float().mean()),
        "flagged of anything else": float(hit[kind < 0].float().mean()),
    }
