"""The output of a call of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic

import numpy as np
from PIL.Image import Image
from torch import Tensor

from ..outputs import Output

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # with a default, which typing has from Python 3.13 on

    ImagesT = TypeVar("ImagesT", bound=list[Image] | np.ndarray | Tensor, default=list[Image])
else:
    from typing import TypeVar

    ImagesT = TypeVar("ImagesT")


@dataclass(eq=False)
class StableDiffusionPipelineOutput(Output, Generic[ImagesT]):
    """`images`: a list of PIL images, an array (b, h, w, 3), a tensor (b, 3, h, w), or latents.

    `nsfw_content_detected`: one flag per image, or None without a safety checker. By attribute only: `seeds`, one per
    image if the call had seeds; `scores`, one dictionary per image from imvar's safety checker, with
    `special_scores` and `concept_scores` by concept number (above 0 is a hit) and the hits in `special_care` and
    `bad_concepts`.
    """

    attribute_only: ClassVar[tuple[str, ...]] = ("seeds", "scores")
    images: ImagesT
    nsfw_content_detected: list[bool] | None = None
    seeds: list[int] | None = None
    scores: list[dict[str, Any]] | None = None
