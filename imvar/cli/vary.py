"""`imvar vary`: variations of each photo."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .render import make_images
from .rows import Row, seed_cells
from .sources import InputImage


def run(args: argparse.Namespace) -> None:
    make_images(args, vary_rows)


def vary_rows(args: argparse.Namespace, sources: Sequence[InputImage]) -> list[Row]:
    """Return a row for each source, a cell for each seed."""
    return [
        Row(source.path.name, source.thumbnail(), seed_cells(args, source.name, source.call_arguments))
        for source in sources
    ]
