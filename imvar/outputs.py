"""Results that can be read by attribute, by key, by index, or unpacked with `to_tuple()`.

A field that is None counts as absent in the last three, as in diffusers and transformers; one that is `aside` always
does, so that code which unpacks what the reference returns goes on working.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor


ATTRIBUTE_ONLY = {"aside": True}  # of a field that is read by attribute alone


class Output(Mapping[str, Any]):
    """The base of every result: subclasses are dataclasses."""

    def _present(self) -> dict[str, Any]:
        short_repr = (f for f in fields(self) if not f.metadata.get("aside"))  # type: ignore[arg-type]
        values = ((f.name, getattr(self, f.name)) for f in short_repr)
        return {name: value for name, value in values if value is not None}

    def __getitem__(self, key: str | int | slice) -> Any:
        return self._present()[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, in the order of the fields."""
        return tuple(self._present().values())


@dataclass(eq=False)
class StableDiffusionPipelineOutput(Output):
    """`images`: list of PIL pictures, or (b, h, w, 3) array, or (b, 3, h, w) tensor, or latents.

    `nsfw_content_detected`: one flag a picture, or None where no safety checker looked. By attribute alone, `seeds`:
    that of each picture, where the call was given any; `scores`: what imvar's safety checker measured of each,
    by number of the concept, in `special_scores` and `concept_scores`, where above 0 is a hit, and the hits in
    `special_care` and `bad_concepts`.
    """

    images: list[Image] | np.ndarray | Tensor
    nsfw_content_detected: list[bool] | None
    seeds: list[int] | None = field(default=None, metadata=ATTRIBUTE_ONLY)
    scores: list[dict[str, Any]] | None = field(default=None, metadata=ATTRIBUTE_ONLY)


@dataclass(eq=False)
class UNet2DConditionOutput(Output):
    """`sample`: (b, c, h, w), what the network predicts of the noisy latents."""

    sample: Tensor


@dataclass(eq=False)
class DecoderOutput(Output):
    """`sample`: (b, 3, 8h, 8w), pictures with values around [-1, 1]."""

    sample: Tensor


@dataclass(eq=False)
class AutoencoderKLOutput(Output):
    """`latent_dist`: the Gaussian over latents that an encoder found for each picture."""

    latent_dist: Any


@dataclass(eq=False)
class CLIPVisionModelOutput(Output):
    """`image_embeds`: (b, projection), not normalised; `last_hidden_state`: (b, 1 + patches, width).

    `hidden_states`: that of the embedding and of every layer, where asked for.
    """

    image_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class SchedulerOutput(Output):
    """`prev_sample`: (b, c, h, w), the latents one step less noisy."""

    prev_sample: Tensor


@dataclass(eq=False)
class DenoisedOutput(SchedulerOutput):
    """`pred_original_sample`: the clean latents that this step's prediction implies."""

    pred_original_sample: Tensor | None = None
