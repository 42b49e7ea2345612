"""`imvar vary`: variations of each photo."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..errors import InputError, invalid
from ..photos import expand_photos
from .render import make_images
from .rows import Row, seed_cells
from .sources import InputImage


def run(args: argparse.Namespace) -> None:
    photos = expand_photos(args.photos)
    if any(path.is_dir() and path.resolve() == args.out.resolve() for path in args.photos):
        hint = "the next call would vary the images of this one"
        raise invalid(InputError, "-o", "another folder than that of the photos", str(args.out), hint)
    args.photos = photos
    make_images(args, vary_rows)


def vary_rows(args: argparse.Namespace, sources: Sequence[InputImage]) -> list[Row]:
    """Return a row for each source, a cell for each seed."""
    return [
        Row(source.title, str(source.path), source.thumbnail, seed_cells(args, source.name, source.call_arguments))
        for source in sources
    ]
