"""`imvar mix`: variations of the weighted sum of several image embeddings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from ..embeddings import mix
from .render import make_images
from .rows import Row, joined_name, seed_cells, side_by_side
from .sources import InputImage


def run(args: argparse.Namespace) -> None:
    make_images(args, mix_rows)


def mix_rows(args: argparse.Namespace, sources: Sequence[InputImage]) -> list[Row]:
    """Return one row, a cell for each seed."""

    def mixture(pipe: Any) -> dict[str, Any]:
        pairs = zip(sources, args.weights, strict=True)
        return {"image_embeds": mix((source.embed(pipe), weight) for source, weight in pairs)}

    parts = zip(sources, args.weights, strict=True)
    caption = " + ".join(f"{weight:g} {source.name}" for source, weight in parts)
    cells = seed_cells(args, joined_name(sources), mixture)
    return [Row(caption, [str(source.path) for source in sources], partial(side_by_side, sources), cells)]
