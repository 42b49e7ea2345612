"""The sources of variations: photos, and image embeddings in files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..contact_sheet import FAINT, PAPER
from ..embeddings import load_image_embeds
from ..errors import CheckpointError, describe, invalid
from ..image.load_image import load_image

CARD = 128  # pixels, the side of what stands for an embedding on the contact sheet


@dataclass
class InputImage:
    """A photo or an embedding (1, 1, c), with the name of its outputs."""

    path: Path
    name: str
    photo: Image.Image | None
    embeds: Tensor | None

    def embed(self, pipe: Any) -> Tensor:
        """Return the embedding, (1, 1, c), computed once."""
        embeds = pipe.encode_image(self.photo) if self.embeds is None else self.embeds
        self.embeds = embeds
        return embeds

    def call_arguments(self, pipe: Any) -> dict[str, Any]:
        """Return the argument of a call that selects this source."""
        return {"image_embeds": self.embed(pipe)} if self.photo is None else {"image": self.photo}

    def thumbnail(self) -> Image.Image:
        """Return the photo, or a card that stands for an embedding."""
        if self.photo is not None:
            return self.photo
        card = Image.new("RGB", (CARD, CARD), PAPER)
        draw = ImageDraw.Draw(card)
        draw.rectangle((0, 0, CARD - 1, CARD - 1), outline=FAINT)
        draw.text((CARD // 2, CARD // 2), "embedding", FAINT, ImageFont.load_default(13), anchor="mm")
        return card


def read_sources(paths: Sequence[Path]) -> list[InputImage]:
    """Return the sources in these files: an embedding if the name ends in .safetensors, else a photo."""
    return [read_source(path, name) for path, name in zip(paths, unique_names([p.stem for p in paths]), strict=True)]


def read_source(path: Path, name: str) -> InputImage:
    """Return the source in a file. Raises `InputError` or `CheckpointError`."""
    if path.suffix != ".safetensors":
        return InputImage(path, name, load_image(path), None)
    embeds = load_image_embeds(path)
    if len(embeds) != 1:
        raise invalid(CheckpointError, path, "one embedding (1, 1, c)", describe(embeds))
    return InputImage(path, name, None, embeds)


def unique_names(stems: Sequence[str]) -> list[str]:
    """Return the names, numbered where they repeat; case does not distinguish them, as on some file systems."""
    names: list[str] = []
    for stem in stems:
        name, k = stem, 2
        while name.casefold() in map(str.casefold, names):
            name, k = f"{stem}-{k}", k + 1
        names.append(name)
    return names
