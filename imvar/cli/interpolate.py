"""`imvar interpolate`: images between two images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from ..embeddings import slerp
from .render import make_images
from .rows import Cell, Condition, Row, side_by_side
from .sources import InputImage


def run(args: argparse.Namespace) -> None:
    make_images(args, interpolate_rows)


def interpolate_rows(args: argparse.Namespace, sources: Sequence[InputImage]) -> list[Row]:
    """Return one row from the first source to the second, all cells of one seed."""
    first, second = sources

    def between(t: float) -> Condition:
        return lambda pipe: {"image_embeds": slerp(first.embed(pipe), second.embed(pipe), t)}

    digits = len(str(args.n))
    cells = [
        Cell(f"{first.name}-to-{second.name}-{k + 1:0{digits}}", f"t = {t:.2f}", args.seed, between(t))
        for k, t in enumerate(k / (args.n - 1) for k in range(args.n))
    ]
    return [
        Row(
            f"{first.name} to {second.name}, seed {args.seed}",
            [str(first.path), str(second.path)],
            partial(side_by_side, sources),
            cells,
        )
    ]
