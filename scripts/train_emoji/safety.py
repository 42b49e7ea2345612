"""A demonstration safety checker: it flags drawings of eight concepts, with thresholds that flag little else.

It shows the published class in use on this model's images. It is not a moderation filter.
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
NEVER = 2.0  # a threshold that no cosine reaches, for the unused ones of the 17 concepts and 3 special ones
FALSE_POSITIVES = 0.01  # at most, of drawings of other concepts, over all thresholds


def embed(model: nn.Module, pixels: Tensor) -> Tensor:
    return model.visual_projection(model.vision_model(pixels).pooler_output)


@torch.no_grad()
def calibrate(checker: StableDiffusionSafetyChecker, drawings: Drawings, seed: int) -> dict[str, float]:
    """Set concepts and thresholds in place; return the rates of true and false positives on the drawings."""
    generator = torch.Generator().manual_seed(seed)
    codes = [code(character) for character in SAFETY_CONCEPTS.values()]
    device = next(checker.parameters()).device
    views = [drawings.rgb(), *(view(drawings.images, generator, strong=False) for _ in range(2))]
    embedding = torch.cat([embed(checker, pixels(chunk.to(device))).cpu() for rgb in views for chunk in rgb.split(256)])
    embedding = F.normalize(embedding, dim=-1)
    kind = torch.tensor([codes.index(point) if point in codes else -1 for point in drawings.codes]).repeat(len(views))
    table = F.normalize(torch.stack([embedding[kind == i].mean(0) for i in range(len(codes))]), dim=-1)
    cosines = embedding @ table.T
    others = cosines[kind == -1].sort(0, descending=True).values
    allowed = int(FALSE_POSITIVES * (kind == -1).sum() / len(codes))  # false positives per concept
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
