"""The contact sheet: one row per photo, with its variations to the right."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unicodedata import category, normalize

from PIL import Image, ImageDraw, ImageFont, ImageOps

SIDE = 256  # pixels, the longer side of a variation; small ones are enlarged by the largest integer that fits
GAP, MARGIN, GUTTER = 10, 28, 34  # between variations, around the sheet, between photo and variations
CAPTION = 30
PAPER, INK, FAINT, RULE = "#faf9f6", "#2b2a28", "#8a8780", "#dedbd4"
FONT_SIZE = 13
FONTS = "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "arial.ttf", "msyh.ttc"
"""Of Linux, macOS and Windows, for names in characters that Pillow's own font lacks: it has ASCII and some signs."""
NO_CHARACTER = "\U0010ffff"  # which Unicode has set aside, so that each font draws its sign for a missing glyph

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass
class SheetRow:
    """A photo with its name, and its variations with their captions."""

    name: str
    photo: Image.Image
    variations: list[tuple[str, Image.Image]] = field(default_factory=list)


def contact_sheet(rows: Sequence[SheetRow], footer: str) -> Image.Image:
    """Return the sheet as an RGB image; every row needs at least one variation."""
    width, height = size_on_sheet(rows[0].variations[0][1])
    photos = [photo_on_sheet(row.photo, height) for row in rows]
    photo_width = max(photo.width for photo in photos)
    columns = max(len(row.variations) for row in rows)
    sheet_width = MARGIN + photo_width + GUTTER + columns * (width + GAP) - GAP + MARGIN
    sheet_height = MARGIN + len(rows) * (height + CAPTION + GAP) + CAPTION + MARGIN // 2

    sheet = Image.new("RGB", (sheet_width, sheet_height), PAPER)
    draw = ImageDraw.Draw(sheet)

    def draw_line(text: str, x: int, y: int, width: int, ink: str) -> None:
        text, font = drawable(text)
        draw.text((x, y), fit_text(text, font, width), ink, font)

    def place(image: Image.Image, caption: str, x: int, y: int, ink: str) -> None:
        sheet.paste(image, (x, y + height - image.height))
        draw_line(caption, x, y + height + 7, image.width, ink)

    for i, (row, photo) in enumerate(zip(rows, photos, strict=True)):
        y = MARGIN + i * (height + CAPTION + GAP)
        place(photo, row.name, MARGIN + photo_width - photo.width, y, INK)
        for k, (caption, variation) in enumerate(row.variations):
            x = MARGIN + photo_width + GUTTER + k * (width + GAP)
            place(as_on_sheet(variation), caption, x, y, FAINT)
    x = MARGIN + photo_width + GUTTER // 2
    draw.line((x, MARGIN, x, sheet_height - MARGIN // 2 - 2 * CAPTION - GAP), RULE)
    draw_line(footer, MARGIN, sheet_height - MARGIN // 2 - CAPTION + 4, sheet_width - 2 * MARGIN, FAINT)
    return sheet


def size_on_sheet(image: Image.Image) -> tuple[int, int]:
    """Return width and height on the sheet: reduced to fit `SIDE`, or enlarged by an integer factor."""
    if factor := SIDE // max(image.size):
        return image.width * factor, image.height * factor
    return ImageOps.contain(image, (SIDE, SIDE)).size


def as_on_sheet(image: Image.Image) -> Image.Image:
    """Return a variation in its size on the sheet; one in this size as it is."""
    size = size_on_sheet(image)
    resampling = Image.Resampling.BICUBIC if size > image.size else Image.Resampling.LANCZOS
    return image if size == image.size else image.resize(size, resampling)


def photo_on_sheet(photo: Image.Image, height: int = SIDE) -> Image.Image:
    """Return a photo in the largest size that it has on a sheet whose variations are `height` pixels high."""
    scale = min(3 * height / 2 / photo.width, height / photo.height)
    width, height = (max(1, round(side * scale)) for side in photo.size)
    return photo.resize((width, height), Image.Resampling.BICUBIC)


def drawable(text: str) -> tuple[str, Font]:
    """Return a text as one line that a font can draw, and the font: Pillow's own, or one that has more of it.

    Control characters become spaces. Characters that the font lacks lose their accents, or become "?".
    """
    text = normalize("NFC", text.encode("utf-8", "replace").decode())  # "?" for bytes of a name that are not UTF-8
    text = "".join(c if c.isprintable() else " " for c in text)
    font: Font = ImageFont.load_default(FONT_SIZE)
    if lacking(text, font):
        font = min([font, *system_fonts()], key=lambda font: len(lacking(text, font)))
    for c in lacking(text, font):
        parts = [part for part in normalize("NFKD", c) if category(part)[0] != "M"]  # without accents
        text = text.replace(c, "".join("?" if lacking(part, font) else part for part in parts))
    return text, font


def lacking(text: str, font: Font) -> list[str]:
    """Return the characters of a text that a font has no glyph for, each once."""
    missing = glyph(NO_CHARACTER, font)
    return [c for c in dict.fromkeys(text) if glyph(c, font) == missing]


def glyph(character: str, font: Font) -> tuple[tuple[int, int], bytes]:
    """Return the size and the pixels of a character."""
    mask: Any = font.getmask(character)
    return mask.size, bytes(mask)


@cache
def system_fonts() -> list[ImageFont.FreeTypeFont]:
    """Return those of `FONTS` that this machine has."""
    fonts = []
    for name in FONTS:
        with suppress(OSError):
            fonts.append(ImageFont.truetype(name, FONT_SIZE))
    return fonts


def fit_text(text: str, font: Font, width: int) -> str:
    """Return the text, shortened to fit `width` pixels."""
    if font.getlength(text) <= width:
        return text
    return text[: bisect(range(1, len(text)), width, key=lambda end: font.getlength(text[:end] + "…"))] + "…"
