"""Output classes: fields are read by attribute, by key or by index, or unpacked with `to_tuple()`.

As in diffusers and transformers, all but attribute access skip fields that are None. They also skip the fields that
imvar adds (`ATTRIBUTE_ONLY`), so that code that unpacks the outputs of diffusers keeps working.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor


ATTRIBUTE_ONLY = {"attribute_only": True}  # metadata of such a field


class Output(Mapping[str, Any]):
    """Base of all outputs; subclasses are dataclasses."""

    def _present(self) -> dict[str, Any]:
        names = [f.name for f in fields(self) if not f.metadata.get("attribute_only")]  # type: ignore[arg-type]
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def __getitem__(self, key: str | int | slice) -> Any:
        return self._present()[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values that are not None, in the order of the fields."""
        return tuple(self._present().values())


@dataclass(eq=False)
class StableDiffusionPipelineOutput(Output):
    """`images`: a list of PIL images, an array (b, h, w, 3), a tensor (b, 3, h, w), or latents.

    `nsfw_content_detected`: one flag per image, or None without a safety checker. By attribute only: `seeds`, one per
    image if the call had seeds; `scores`, one dictionary per image from imvar's safety checker, with
    `special_scores` and `concept_scores` by concept number (above 0 is a hit) and the hits in `special_care` and
    `bad_concepts`.
    """

    images: list[Image] | np.ndarray | Tensor
    nsfw_content_detected: list[bool] | None
    seeds: list[int] | None = field(default=None, metadata=ATTRIBUTE_ONLY)
    scores: list[dict[str, Any]] | None = field(default=None, metadata=ATTRIBUTE_ONLY)


@dataclass(eq=False)
class UNet2DConditionOutput(Output):
    """`sample`: (b, c, h, w), the prediction for the noisy latents: noise or velocity."""

    sample: Tensor


@dataclass(eq=False)
class DecoderOutput(Output):
    """`sample`: (b, 3, 8h, 8w), images with values around [-1, 1]."""

    sample: Tensor


@dataclass(eq=False)
class AutoencoderKLOutput(Output):
    """`latent_dist`: the Gaussian posterior over the latents of each image."""

    latent_dist: Any


@dataclass(eq=False)
class CLIPVisionModelOutput(Output):
    """`image_embeds`: (b, projection), not normalized; `last_hidden_state`: (b, 1 + patches, width).

    `hidden_states`: those of the embedding and of every layer, if requested.
    """

    image_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class BaseModelOutput(Output):
    """`last_hidden_state`: (b, n, c). `hidden_states`: the input of every layer and the last output, on request."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class BaseModelOutputWithPooling(Output):
    """`last_hidden_state`: (b, n, c); `pooler_output`: (b, c). `hidden_states` as in `BaseModelOutput`."""

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class Transformer2DModelOutput(Output):
    """`sample`: (b, c, h, w)."""

    sample: Tensor


@dataclass(eq=False)
class SchedulerOutput(Output):
    """`prev_sample`: (b, c, h, w), the latents of the next, less noisy timestep."""

    prev_sample: Tensor


@dataclass(eq=False)
class DenoisedOutput(SchedulerOutput):
    """`pred_original_sample`: (b, c, h, w), the predicted clean latents."""

    pred_original_sample: Tensor | None = None
