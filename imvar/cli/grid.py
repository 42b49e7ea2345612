"""`imvar grid`: an image for each combination of the values of two options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..errors import InputError, invalid
from .render import make_images
from .rows import Cell, Row
from .sources import InputImage


def run(args: argparse.Namespace) -> None:
    make_images(args, grid_rows)


def grid_rows(args: argparse.Namespace, sources: Sequence[InputImage]) -> list[Row]:
    """Return a row for each value of one option, a cell for each value of another."""
    (source,), (row_option, row_values), (option, values) = sources, args.rows, args.columns
    if row_option == option:
        raise invalid(InputError, "--columns", f"another option than --rows {row_option}", option)
    return [
        Row(
            f"{row_option} {of_row}",
            str(source.path),
            source.thumbnail,
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
