"""The safety checker: a CLIP vision model and two lists of concepts whose embeddings no image should be close to."""

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
from ..errors import ImvarError, InputTypeError, describe, invalid, short_repr
from ..weights import key_tables
from ..weights.keymap import Keymap
from ..weights.pretrained import TransformersModel
from .clip import CLIPVisionConfig, CLIPVisionModel
from .validation import check_checker_inputs

N_CONCEPTS, N_SPECIAL_CARE = 17, 3
ADJUSTMENT = 0.01  # added to every later score of an image that is close to a special-care concept

logger = logging.getLogger("imvar")


@dataclass(frozen=True, eq=False, repr=False)
class CLIPConfig(Config):
    """`safety_checker/config.json`. Its own `projection_dim` counts, not that of `vision_config`."""

    text_config: Mapping[str, Any] | None = None
    vision_config: Any = None  # a CLIPVisionConfig or its fields
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    initializer_factor: float = 1.0

    def check(self) -> None:
        super().check()
        check_ints(self, "projection_dim")
        vision = {} if self.vision_config is None else as_settings(self.vision_config)
        if vision is None:
            expected = "the config of a CLIP vision model"
            raise invalid(InputTypeError, "vision_config", expected, short_repr(self.vision_config))
        object.__setattr__(self, "vision_config", CLIPVisionConfig.from_dict(vision))


class StableDiffusionSafetyChecker(TransformersModel, part="safety_checker"):
    """Flags an image whose embedding is closer to a concept than that concept's threshold.

    A hit among the special-care concepts lowers the other thresholds for that image.
    """

    config_class = CLIPConfig
    config: CLIPConfig
    model_type = "clip"
    main_input_name = "clip_input"

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        vision, dim = self.config.vision_config, self.config.projection_dim
        self.vision_model = CLIPVisionModel(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, dim, bias=False)
        self.concept_embeds = nn.Parameter(torch.ones(N_CONCEPTS, dim), requires_grad=False)
        self.special_care_embeds = nn.Parameter(torch.ones(N_SPECIAL_CARE, dim), requires_grad=False)
        self.concept_embeds_weights = nn.Parameter(torch.ones(N_CONCEPTS), requires_grad=False)  # the thresholds
        self.special_care_embeds_weights = nn.Parameter(torch.ones(N_SPECIAL_CARE), requires_grad=False)

    @classmethod
    def min_tensor_count(cls, config: CLIPConfig) -> int:
        return config.vision_config.num_hidden_layers

    @property
    def keymap(self) -> Keymap:
        return key_tables.safety_checker(self.config.vision_config.num_hidden_layers)

    @torch.no_grad()
    def scores(self, clip_input: Tensor) -> tuple[Tensor, Tensor]:
        """Images (b, 3, s, s) to special-care (b, 3) and concept (b, 17) scores; above 0 is a hit.

        A score is the cosine similarity of image and concept minus the concept's threshold, to three decimals.
        """
        embeds = F.normalize(self.visual_projection(self.vision_model(clip_input)[1]))

        def excess(concepts: Tensor, thresholds: Tensor) -> Tensor:
            return (embeds @ F.normalize(concepts).T).cpu().float() - thresholds.cpu().float()

        special = excess(self.special_care_embeds, self.special_care_embeds_weights)
        hit = (special.round(decimals=3) > 0).cumsum(dim=1) > 0
        stricter_from = F.pad(hit[:, :-1], (1, 0))  # a hit affects the concepts after it
        special = (special + ADJUSTMENT * stricter_from).round(decimals=3)
        concepts = excess(self.concept_embeds, self.concept_embeds_weights)
        return special, (concepts + ADJUSTMENT * hit[:, -1:]).round(decimals=3)

    @validated(check_checker_inputs)
    def forward(self, clip_input: Tensor, images: Any) -> tuple[Any, Flags]:
        """Check images by `clip_input` (b, 3, s, s); return `images` with the flagged ones black, and the flags.

        `images`: an array, a tensor, or a list of either, one entry per image; the argument itself is not changed.
        """
        flags = Flags(*self.scores(clip_input))
        if any(flags):
            logger.warning("the safety checker flagged %d of %d images; another seed may help", sum(flags), len(flags))
            images = black_out(images, flags)
        return images, flags


class Flags(list[bool]):
    """One flag per image, True for one that is close to a concept; `scores` has the measured values of each."""

    def __init__(self, special: Tensor, concepts: Tensor):
        if not (special.isfinite().all() and concepts.isfinite().all()):
            hint = "its weights contain NaN, or half precision overflowed: try safety_checker.float()"
            raise invalid(ImvarError, "safety_checker", "finite scores", "NaN or infinite ones", hint)
        self.extend((concepts > 0).any(dim=1).tolist())  # torch.compile cannot trace super().__init__ here
        special_reports = [score_report("special_scores", "special_care", row) for row in special]
        concept_reports = [score_report("concept_scores", "bad_concepts", row) for row in concepts]
        self.scores = [a | b for a, b in zip(special_reports, concept_reports, strict=True)]


def score_report(name: str, hits: str, scores: Tensor) -> dict[str, Any]:
    """Return the scores of one image by concept index, and the indices of the hits."""
    by_index = {index: round(score, 3) for index, score in enumerate(scores.tolist())}
    return {name: by_index, hits: [index for index, score in by_index.items() if score > 0]}


def black_like(image: Any) -> Any:
    """Return a black image of the same kind and size."""
    if isinstance(image, Image.Image):
        return Image.new(image.mode, image.size)
    if not isinstance(image, (Tensor, np.ndarray)):
        raise invalid(InputTypeError, "images", "PIL images, tensors or arrays", describe(image))
    return torch.zeros_like(image) if isinstance(image, Tensor) else np.zeros_like(image)


def black_out(images: Any, flags: Sequence[bool]) -> Any:
    """Return a copy of `images` in which the flagged ones are zero."""
    if images is None:
        return None
    if isinstance(images, (list, tuple)):
        return [black_like(image) if flag else image for image, flag in zip(images, flags, strict=True)]
    out = images.clone() if isinstance(images, Tensor) else np.array(images)
    for i, flag in enumerate(flags):
        if flag:
            out[i] = 0
    return out
