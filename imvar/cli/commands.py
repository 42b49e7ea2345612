"""The commands: each lays out the images it makes, as rows of cells, before anything is computed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from ..embeddings import mix, slerp
from ..errors import InputError, invalid
from ..image.grid import make_image_grid
from ..noise import MAX_SEED
from .sources import InputImage

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
    """A row of the contact sheet: a photo or several, and the cells beside it."""

    name: str
    photo: Image
    cells: list[Cell]


def vary_rows(args: argparse.Namespace, sources: Sequence[InputImage]) -> list[Row]:
    """`imvar vary`: a row for each source, a cell for each seed."""
    return [
        Row(source.path.name, source.thumbnail(), seed_cells(args, source.name, source.call_arguments))
        for source in sources
    ]


def mix_rows(args: argparse.Namespace, sources: Sequence[InputImage]) -> list[Row]:
    """`imvar mix`: one row, a cell for each seed."""

    def mixture(pipe: Any) -> dict[str, Any]:
        pairs = zip(sources, args.weights, strict=True)
        return {"image_embeds": mix((source.embed(pipe), weight) for source, weight in pairs)}

    parts = zip(sources, args.weights, strict=True)
    caption = " + ".join(f"{weight:g} {source.name}" for source, weight in parts)
    cells = seed_cells(args, "+".join(source.name for source in sources), mixture)
    return [Row(caption, side_by_side(sources), cells)]


def interpolate_rows(args: argparse.Namespace, sources: Sequence[InputImage]) -> list[Row]:
    """`imvar interpolate`: one row from the first source to the second, all cells of one seed."""
    first, second = sources

    def between(t: float) -> Condition:
        return lambda pipe: {"image_embeds": slerp(first.embed(pipe), second.embed(pipe), t)}

    digits = len(str(args.n))
    cells = [
        Cell(f"{first.name}-to-{second.name}-{k + 1:0{digits}}", f"t = {t:.2f}", args.seed, between(t))
        for k, t in enumerate(k / (args.n - 1) for k in range(args.n))
    ]
    return [Row(f"{first.name} to {second.name}, seed {args.seed}", side_by_side(sources), cells)]


def grid_rows(args: argparse.Namespace, sources: Sequence[InputImage]) -> list[Row]:
    """`imvar grid`: a row for each value of one option, a cell for each value of another."""
    (source,), (row_option, row_values), (option, values) = sources, args.rows, args.columns
    if row_option == option:
        raise invalid(InputError, "--columns", f"another option than --rows {row_option}", option)
    return [
        Row(
            f"{row_option} {of_row}",
            source.thumbnail(),
            [
                Cell(
                    f"{source.name}-{row_option}-{of_row}-{option}-{value}",
                    f"{option} {value}",
                    options.get("seed", args.seed),
                    source.call_arguments,
                    {name: v for name, v in options.items() if name != "seed"},
                )
                for value in values
                for options in [{row_option: of_row, option: value}]
            ],
        )
        for of_row in row_values
    ]


def seed_cells(args: argparse.Namespace, name: str, condition: Condition) -> list[Cell]:
    """Return a cell for each of `args.n` seeds."""
    if args.seed + args.n - 1 > MAX_SEED:
        raise invalid(InputError, "--seed", f"at most {MAX_SEED - args.n + 1} for {args.n} variations", str(args.seed))
    seeds = range(args.seed, args.seed + args.n)
    return [Cell(f"{name}-{seed}", f"seed {seed}", seed, condition) for seed in seeds]


def side_by_side(sources: Sequence[InputImage]) -> Image:
    """Return the photos of several sources as one image."""
    height = max(source.thumbnail().height for source in sources)
    photos = [source.thumbnail() for source in sources]
    return make_image_grid([photo.resize((height, height)) for photo in photos], rows=1, cols=len(photos))
