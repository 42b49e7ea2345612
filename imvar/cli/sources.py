"""The sources of variations: photos, and image embeddings in files."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..contact_sheet import FAINT, PAPER, photo_on_sheet
from ..embeddings import load_image_embeds
from ..errors import CheckpointError, InputError, describe, invalid
from ..image.load_image import load_image, open_image
from ..image.mask import check_opaque
from ..photos import STDIN, is_embedding, unique_names

STDIN_NAME = "standard input"
MAX_ERRORS = 5  # printed, of files that cannot be used
CARD = 128  # pixels, the side of what stands for an embedding on the contact sheet


@dataclass
class InputImage:
    """A photo or an embedding (1, 1, c), with the name of its outputs. A photo is read again whenever it is needed."""

    path: Path
    name: str
    embeds: Tensor | None = None
    data: bytes | None = None  # of a photo on standard input

    @property
    def title(self) -> str:
        """The name of the file."""
        return self.path.name if self.data is None else STDIN_NAME

    @property
    def is_embedding(self) -> bool:
        return is_embedding(self.path)

    def photo(self) -> Image.Image:
        """Return the photo."""
        return load_image(self.openable())

    def openable(self) -> Path | io.BytesIO:
        """Return the path, or the bytes of standard input as a file."""
        if self.data is None:
            return self.path
        file = io.BytesIO(self.data)
        file.name = STDIN_NAME  # in errors
        return file

    def embed(self, pipe: Any) -> Tensor:
        """Return the embedding, (1, 1, c), computed once."""
        embeds = pipe.encode_image(self.photo()) if self.embeds is None else self.embeds
        self.embeds = embeds
        return embeds

    def call_arguments(self, pipe: Any) -> dict[str, Any]:
        """Return the argument of a call that selects this source."""
        return {"image_embeds": self.embed(pipe)} if self.is_embedding else {"image": self.photo()}

    def thumbnail(self) -> Image.Image:
        """Return the photo as on the contact sheet, or a card that stands for an embedding."""
        if not self.is_embedding:
            return photo_on_sheet(self.photo())
        card = Image.new("RGB", (CARD, CARD), PAPER)
        draw = ImageDraw.Draw(card)
        draw.rectangle((0, 0, CARD - 1, CARD - 1), outline=FAINT)
        draw.text((CARD // 2, CARD // 2), "embedding", FAINT, ImageFont.load_default(13), anchor="mm")
        return card


def read_sources(
    paths: Sequence[Path], progress: Callable[[Sequence[Path]], Iterable[Path]] = iter
) -> list[InputImage]:
    """Return the sources in these files: an embedding if the name ends in .safetensors, else a photo.

    All files are read before the error of the first that cannot be used is raised; the other errors are its notes.
    """
    names = unique_names(["stdin" if path == STDIN else path.stem for path in paths])
    sources, first, others = [], None, []
    for path, name in zip(progress(paths), names, strict=True):
        try:
            sources.append(read_source(path, name))
        except (InputError, CheckpointError) as error:
            others += [str(error)] if first else []
            first = first or error
    if first is None:
        return sources
    for text in others[: MAX_ERRORS - 1]:
        first.add_note(text)
    if (more := len(others) - MAX_ERRORS + 1) > 0:
        first.add_note(f"{more} more file{'s' * (more > 1)} cannot be used")
    raise first


def read_source(path: Path, name: str) -> InputImage:
    """Return the source in a file, which is read whole to check it. Raises `InputError` or `CheckpointError`."""
    if not is_embedding(path):
        source = InputImage(path, name, data=read_stdin() if path == STDIN else None)
        source.photo()
        return source
    embeds = load_image_embeds(path)
    if len(embeds) != 1:
        raise invalid(CheckpointError, path, "one embedding (1, 1, c)", describe(embeds))
    return InputImage(path, name, embeds)


def read_photo(option: str, path: Path, is_mask: bool = False) -> Image.Image:
    """Return the image of an option that takes no embedding; of a mask, without transparency."""
    if is_embedding(path):
        raise invalid(InputError, option, "an image", f"{path}, an embedding", "only --negative and PHOTO take those")
    source = read_source(path, option)
    if is_mask:
        with open_image(source.openable()) as (file, name):
            check_opaque(name, file)
    return source.photo()


def read_stdin() -> bytes:
    """Return the bytes of standard input."""
    if sys.stdin.isatty():
        raise invalid(InputError, STDIN, "an image on standard input", "a terminal", "as in: imvar vary - < fox.png")
    if not (data := sys.stdin.buffer.read()):
        raise invalid(InputError, STDIN, "an image on standard input", "an empty input")
    return data
