"""The images that a command makes, as rows of cells: laid out before anything is computed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..contact_sheet import PAPER, SIDE, photo_on_sheet
from ..errors import InputError, invalid
from ..limits import MAX_SEED
from .sources import InputImage

MAX_NAME = 120  # characters, of several photos
Condition = Callable[[Any], dict[str, Any]]
"""A pipeline to the argument of a call that selects what to vary: `image` or `image_embeds`."""


@dataclass
class Cell:
    """An image to make: its file's name without the suffix, its caption on the sheet, and how to make it."""

    stem: str
    caption: str
    seed: int
    condition: Condition
    options: dict[str, Any] = field(default_factory=dict)  # of the command line, in place of those of all cells


@dataclass
class Row:
    """A row of the contact sheet: a photo or several, read when the row is drawn, and the cells beside it."""

    name: str
    source: str | list[str]  # the path of the photo, or of each
    photo: Callable[[], Image.Image]
    cells: list[Cell]


def seed_cells(args: argparse.Namespace, name: str, condition: Condition) -> list[Cell]:
    """Return a cell for each of `args.n` seeds."""
    if args.seed + args.n - 1 > MAX_SEED:
        raise invalid(InputError, "--seed", f"at most {MAX_SEED - args.n + 1} for {args.n} variations", str(args.seed))
    seeds = range(args.seed, args.seed + args.n)
    return [Cell(f"{name}-{seed}", f"seed {seed}", seed, condition) for seed in seeds]


def joined_name(sources: Sequence[InputImage]) -> str:
    """Return a name for several sources: all of theirs, or that of the first if it would be too long for a file."""
    name = "+".join(source.name for source in sources)
    return name if len(name) <= MAX_NAME else f"{sources[0].name}+{len(sources) - 1} more"


def side_by_side(sources: Sequence[InputImage]) -> Image.Image:
    """Return the photos of several sources as one image, in their proportions."""
    photos = [photo_on_sheet(source.thumbnail()) for source in sources]
    strip = Image.new("RGB", (sum(photo.width for photo in photos), SIDE), PAPER)
    x = 0
    for photo in photos:
        strip.paste(photo, (x, (SIDE - photo.height) // 2))
        x += photo.width
    return strip
