"""`imvar grid`: an image for each combination of the values of two options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from .render import make_images
from .rows import Cell, Row
from .sources import InputImage


def run(args: argparse.Namespace) -> None:
    make_images(args, grid_rows)


def grid_rows(args: argparse.Namespace, sources: Sequence[InputImage]) -> list[Row]:
    """Return a row for each value of one option, a cell for each value of another."""
    (source,), (row_option, row_values), (option, values) = sources, args.rows, args.columns
    return [
        Row(
            f"{row_option} {text_of_value(of_row)}",
            str(source.path),
            source.thumbnail,
            [
                Cell(
                    f"{source.name}-{row_option}-{text_of_value(of_row)}-{option}-{text_of_value(value)}",
                    f"{option} {text_of_value(value)}",
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


def text_of_value(value: Any) -> str:
    """Return the value of an option as it is usually written: 3 for 3.0. Different values have different texts."""
    return str(value).removesuffix(".0")
