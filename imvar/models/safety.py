"""The safety checker: a CLIP tower and two lists of concepts that a picture should not be close to."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..checks import check_ints, validated
from ..config import Config, as_settings
from ..errors import ImvarError, InputTypeError, short_repr
from ..weights import key_tables as tables
from ..weights.keymap import Keymap
from ..weights.pretrained import TransformersModel
from . import validation as inputs
from .clip import CLIPVisionConfig, VisionTower

N_CONCEPTS, N_SPECIAL = 17, 3
ADJUSTMENT = 0.01  # what a special-care hit adds to every later score of that picture

logger = logging.getLogger("imvar")


@dataclass(frozen=True, eq=False, repr=False)
class CLIPConfig(Config):
    """`safety_checker/config.json`. The projection is `projection_dim` here, whatever `vision_config` says."""

    text_config: Mapping[str, Any] | None = None
    vision_config: Any = None  # a CLIPVisionConfig, or what makes one
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    initializer_factor: float = 1.0

    def check(self) -> None:
        super().check()
        check_ints(self, "projection_dim")
        vision = {} if self.vision_config is None else as_settings(self.vision_config)
        if vision is None:
            raise InputTypeError(
                f"vision_config={short_repr(self.vision_config)}: the tower's settings would do", key="vision_config"
            )
        object.__setattr__(self, "vision_config", CLIPVisionConfig.from_dict(vision))


class StableDiffusionSafetyChecker(TransformersModel, part="safety_checker"):
    """Flags a picture whose embedding is closer to a concept than that concept's threshold.

    A hit among the special-care concepts makes the check stricter for that picture.
    """

    config_class = CLIPConfig
    config: CLIPConfig
    model_type = "clip"
    main_input_name = "clip_input"

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        vision, dim = self.config.vision_config, self.config.projection_dim
        self.tower = VisionTower(vision)
        self.proj = nn.Linear(vision.hidden_size, dim, bias=False)
        self.concept_embeds = nn.Parameter(torch.ones(N_CONCEPTS, dim), requires_grad=False)
        self.concept_embeds_weights = nn.Parameter(torch.ones(N_CONCEPTS), requires_grad=False)  # the thresholds
        self.special_care_embeds = nn.Parameter(torch.ones(N_SPECIAL, dim), requires_grad=False)
        self.special_care_embeds_weights = nn.Parameter(torch.ones(N_SPECIAL), requires_grad=False)

    @classmethod
    def min_tensor_count(cls, config: CLIPConfig) -> int:
        return config.vision_config.num_hidden_layers

    @property
    def keymap(self) -> Keymap:
        return tables.safety_checker(len(self.tower.layers))

    @torch.no_grad()
    def scores(self, clip_input: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (b, 3, s, s) to special-care (b, 3) and concept (b, 17) scores; above 0 is a hit.

        A score is the cosine between picture and concept less the concept's threshold, to three decimals.
        """
        embeds = F.normalize(self.proj(self.tower(clip_input)[0]))

        def excess(concepts: Tensor, thresholds: Tensor) -> Tensor:
            return (embeds @ F.normalize(concepts).T).cpu().float() - thresholds.cpu().float()

        special = excess(self.special_care_embeds, self.special_care_embeds_weights)
        hit = (special.round(decimals=3) > 0).cumsum(dim=1) > 0
        stricter_from = F.pad(hit[:, :-1], (1, 0))  # a hit counts for the concepts after it
        special = (special + ADJUSTMENT * stricter_from).round(decimals=3)
        concepts = excess(self.concept_embeds, self.concept_embeds_weights)
        return special, (concepts + ADJUSTMENT * hit[:, -1:]).round(decimals=3)

    @validated(inputs.check_checker_inputs)
    def forward(self, clip_input: Tensor, images: Any) -> tuple[Any, Flags]:
        """Judge pictures by `clip_input` (b, 3, s, s) and return `images` with the flagged ones black, and flags.

        `images`: an array, a tensor, or a list of either, one entry per picture; what came is left as it is.
        """
        flags = Flags(*self.scores(clip_input))
        if any(flags):
            logger.warning(
                "the safety checker flagged %d of %d pictures; another seed may help", sum(flags), len(flags)
            )
            images = black_out(images, flags)
        return images, flags


class Flags(list[bool]):
    """A flag a picture, True for one that is close to a concept, and in `scores` what was measured of each."""

    def __init__(self, special: Tensor, concepts: Tensor):
        if not (special.isfinite().all() and concepts.isfinite().all()):
            raise ImvarError(
                "the safety checker's scores are not finite, so nobody knows what it would say: weights "
                "with NaN, or half precision that overflowed; safety_checker.float() tells which"
            )
        super().__init__((concepts > 0).any(dim=1).tolist())
        few = [score_report("special_scores", "special_care", row) for row in special]
        many = [score_report("concept_scores", "bad_concepts", row) for row in concepts]
        self.scores = [one | other for one, other in zip(few, many, strict=True)]


def score_report(name: str, hits: str, scores: Tensor) -> dict[str, Any]:
    """The scores of one picture by the number of the concept, and which of them are hits."""
    by_number = {number: round(score, 3) for number, score in enumerate(scores.tolist())}
    return {name: by_number, hits: [number for number, score in by_number.items() if score > 0]}


def black_like(image: Any) -> Any:
    if isinstance(image, Image.Image):
        return Image.new(image.mode, image.size)
    if not isinstance(image, (Tensor, np.ndarray)):
        raise InputTypeError(f"images: {type(image).__name__} came; pictures, tensors or arrays would do", key="images")
    return torch.zeros_like(image) if isinstance(image, Tensor) else np.zeros_like(image)


def black_out(images: Any, flags: Sequence[bool]) -> Any:
    """A copy of `images` in which the flagged ones are zero."""
    if images is None:
        return None
    if isinstance(images, (list, tuple)):
        return [black_like(image) if flag else image for image, flag in zip(images, flags, strict=True)]
    black = images.clone() if isinstance(images, Tensor) else np.array(images)
    for i, flag in enumerate(flags):
        if flag:
            black[i] = 0
    return black
