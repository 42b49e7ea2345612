"""The inputs of an image in its record: the names of their files, as far as known, and digests of their pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from ..records.digests import pixels_digest
from ..records.values import as_json
from ..sources import file_of
from .arguments import Call


class Digests:
    """Digests of inputs, each computed once for all rows of a call."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[str | None, Any]] = {}
        self.reasons: list[str] = []

    def of(self, role: str, value: Any) -> str | None:
        """Return the digest of an image, array or tensor; None, with a reason, for anything else."""
        if id(value) not in self.known:
            self.known[id(value)] = self.compute(role, value), value
        return self.known[id(value)][0]

    def compute(self, role: str, value: Any) -> str | None:
        try:
            return pixels_digest(value)
        except Exception as error:  # of third-party arrays, and of images that the call refuses
            self.reasons.append(f"{role}: its pixels could not be recorded ({type(error).__name__})")
            return None


def inputs_of(call: Call, row: int, digests: Digests) -> Iterator[dict[str, Any]]:
    """Yield the inputs of one image of a call: those of its own image, start and mask alone."""
    image, rows = row // call.num_images_per_prompt, call.shape[0]

    def input_entry(role: str, value: Any, **more: Any) -> dict[str, Any]:
        return {"role": role, **file_of(value)._asdict(), "pixels": digests.of(role, value), **more}

    def of_row(role: str, value: Any, count: int) -> dict[str, Any]:
        index = 0 if count == 1 else row if count == rows else image
        return input_entry(role, element(value, index, count))

    if call.regions is not None:
        for region in call.regions:
            embeds = element(
                region.image_embeds, 0 if len(region.image_embeds) == 1 else image, len(region.image_embeds)
            )
            mask = None if region.mask is None else digests.of("mask of a region", region.mask)
            yield input_entry("region", embeds, mask=mask, scale=as_json(region.scale))
    elif call.image_embeds is not None:
        yield of_row("image_embeds", call.given["image_embeds"], call.images)
    else:
        yield of_row("image", call.given["image"], call.images)
    for role, name in {"negative": "negative_image_embeds", "init": "init_image", "mask": "mask_image"}.items():
        if (given := call.given[name]) is not None:
            yield of_row(role, given, len(getattr(call, name)))
    if call.latents is not None:
        yield of_row("latents", call.latents, rows)


def element(value: Any, index: int, count: int) -> Any:
    """Return one of `count` images in a list or batch; the value itself if it is one image."""
    if isinstance(value, (list, tuple)):
        return value[index] if len(value) == count else value[0] if len(value) == 1 else value
    return value[index : index + 1] if isinstance(value, (Tensor, np.ndarray)) and len(value) == count > 1 else value
