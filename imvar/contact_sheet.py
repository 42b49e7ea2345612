"""A contact sheet: each photo with its variations beside it, one row a photo."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont, ImageOps

SIDE = 256  # pixels of the longer side of a variation; of a small one, the whole multiple that comes next below
GAP, MARGIN, GUTTER = 10, 28, 34  # between variations, around the sheet, between a photo and its variations
CAPTION = 30
PAPER, INK, FAINT, RULE = "#faf9f6", "#2b2a28", "#8a8780", "#dedbd4"


@dataclass
class SheetRow:
    """A photo under its name, and its variations under theirs."""

    name: str
    photo: Image.Image
    variations: list[tuple[str, Image.Image]] = field(default_factory=list)


def contact_sheet(rows: Sequence[SheetRow], footer: str) -> Image.Image:
    """The sheet as an RGB picture; every row has at least one variation."""
    first = rows[0].variations[0][1]
    width, height = size_on_sheet(first)
    smooth = Image.Resampling.BICUBIC if width > first.width else Image.Resampling.LANCZOS
    photos = [ImageOps.contain(row.photo, (3 * height // 2, height)) for row in rows]
    column = max(photo.width for photo in photos)
    most = max(len(row.variations) for row in rows)
    across = MARGIN + column + GUTTER + most * (width + GAP) - GAP + MARGIN
    down = MARGIN + len(rows) * (height + CAPTION + GAP) + CAPTION + MARGIN // 2

    sheet = Image.new("RGB", (across, down), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)

    def place(picture: Image.Image, caption: str, x: int, y: int, ink: str) -> None:
        sheet.paste(picture, (x, y + height - picture.height))
        draw.text((x, y + height + 7), fit_text(caption, font, picture.width), ink, font)

    for i, (row, photo) in enumerate(zip(rows, photos, strict=True)):
        y = MARGIN + i * (height + CAPTION + GAP)
        place(photo, row.name, MARGIN + column - photo.width, y, INK)
        for k, (caption, variation) in enumerate(row.variations):
            x = MARGIN + column + GUTTER + k * (width + GAP)
            place(variation.resize((width, height), smooth), caption, x, y, FAINT)
    x = MARGIN + column + GUTTER // 2
    draw.line((x, MARGIN, x, down - MARGIN // 2 - 2 * CAPTION - GAP), RULE)
    draw.text((MARGIN, down - MARGIN // 2 - CAPTION + 4), fit_text(footer, font, across - 2 * MARGIN), FAINT, font)
    return sheet


def size_on_sheet(picture: Image.Image) -> tuple[int, int]:
    """Width and height on the sheet: reduced to fit `SIDE`, or enlarged by a whole factor to keep pixels square."""
    if factor := SIDE // max(picture.size):
        return picture.width * factor, picture.height * factor
    return ImageOps.contain(picture, (SIDE, SIDE)).size


def fit_text(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, shortened to what fits."""
    if font.getlength(text) <= width:
        return text
    return text[: bisect(range(1, len(text)), width, key=lambda end: font.getlength(text[:end] + "…"))] + "…"
