"""The inputs of an image in its record: the names of their files, as far as known, and digests of their pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from ..records.digests import pixels_digest
from ..records.values import as_json
from ..sources import embeds_note, file_of, note_embeds
from ..weights.origin import dtypes_of, layers_of
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


class Inputs:
    """The inputs of the images of one call."""

    def __init__(self, pipe: Any, call: Call):
        self.pipe, self.call, self.digests = pipe, call, Digests()

    def of_row(self, row: int) -> Iterator[dict[str, Any]]:
        """Yield the inputs of one image: those of its own image, start and mask alone."""
        call, digests = self.call, self.digests
        image = row // call.num_images_per_prompt
        if call.regions is not None:
            for i, region in enumerate(call.regions):
                mask = None if region.mask is None else digests.of("mask of a region", region.mask)
                place = {"region": i, "mask": mask, "scale": as_json(region.scale)}
                for entry in self.embedding(region.image_embeds, region.image_embeds, image):
                    yield entry | {"role": "region"} | place
        elif call.image_embeds is not None:
            yield from self.embedding(call.given["image_embeds"], call.image_embeds, image)
        else:
            yield self.input_entry("image", element(call.given["image"], image, call.images))
        if call.negative_image_embeds is not None:
            negative = call.given["negative_image_embeds"]
            for entry in self.embedding(negative, call.negative_image_embeds, image):
                yield entry | {"role": "negative"}
        for role, name in {"init": "init_image", "mask": "mask_image", "latents": "latents"}.items():
            if (given := call.given[name]) is not None:
                count = len(getattr(call, name))
                yield self.input_entry(role, element(given, row if count == call.shape[0] else image, count))

    def input_entry(self, role: str, value: Any) -> dict[str, Any]:
        """Return the entry for an image or tensor."""
        return {"role": role, **file_of(value)._asdict(), "pixels": self.digests.of(role, value)}

    def embedding(self, given: Tensor, embeds: Tensor, image: int) -> Sequence[dict[str, Any]]:
        """Return the entries for the embedding of one image: the photos or files it was computed from, if known.

        `embeds`: those that were `given`, as (k, 1, c), k being 1 or the number of images.
        """
        index, note = image if len(embeds) > 1 else 0, embeds_note(given)
        if note and note.encoder in (None, encoder_of(self.pipe)):
            return note.rows[index]
        return [self.input_entry("image_embeds", embeds[index : index + 1])]


def encoder_of(pipe: Any) -> Any:
    """Return what identifies the weights of the image encoder, if they are those of a file; else None."""
    encoder = pipe.components["image_encoder"]
    origin = getattr(encoder, "_origin", None)
    if origin is None or not origin.is_of(layers := layers_of(encoder)):
        return None
    return replace(origin, state=None), *sorted(map(str, dtypes_of(layers)))


def element(value: Any, index: int, count: int) -> Any:
    """Return one of `count` images in a list or batch; the value itself if it is one image."""
    if isinstance(value, (list, tuple)):
        return value[index] if len(value) == count else value[0] if len(value) == 1 else value
    return value[index : index + 1] if isinstance(value, (Tensor, np.ndarray)) and len(value) == count > 1 else value


def note_photos(pipe: Any, embeds: Tensor, images: Any, preprocess: str) -> Tensor:
    """Note on the embeddings (b, 1, c) of images which these are, if the encoder has the weights of a file."""
    encoder, digests = encoder_of(pipe), Digests()
    if encoder is None:
        return embeds
    count = len(embeds)
    photos = [element(images, i, count) for i in range(count)]
    more = {} if preprocess == "clip" else {"preprocess": preprocess}
    rows = [
        [{"role": "image", **file_of(photo)._asdict(), "pixels": digests.of("image", photo), **more}]
        for photo in photos
    ]
    return embeds if digests.reasons else note_embeds(embeds, rows, encoder)
