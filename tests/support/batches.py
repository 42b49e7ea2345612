"""Batches of tiny images, made in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

import imvar
from imvar import batch

FAST = {"steps": 2, "dtype": "float32", "device": "cpu", "threads": 1}
DRAWINGS = {
    "fox": ("orange", (4, 4, 30, 20)),
    "panda": ("white", (2, 10, 20, 30)),
    "cake": ("pink", (8, 2, 28, 30)),
    "boat": ("blue", (0, 16, 31, 28)),
    "leaf": ("green", (10, 0, 22, 31)),
}


def drawing(name: str) -> Image.Image:
    """Return an image of 32 x 32 pixels."""
    colour, box = DRAWINGS[name]
    image = Image.new("RGB", (32, 32), "gray")
    ImageDraw.Draw(image).ellipse(box, fill=colour)
    return image


def save_drawings(folder: Path, *names: str) -> Path:
    """Write drawings to a folder as PNG, all of them by default, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or DRAWINGS:
        drawing(name).save(folder / f"{name}.png")
    return folder


def write_lines(path: Path, *items: Any) -> Path:
    """Write items as JSON lines, and return the path."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def items(inputs: Any, out: Path, **settings: Any) -> list[dict[str, Any]]:
    """Return the items of a new plan."""
    plan = batch.plan(inputs, out, checkpoint="imvar-emoji", **settings)
    found = [item for number in range(len(plan)) for item in plan.shard(number)]
    shutil.rmtree(out)
    return found


def make_shards(plan: batch.Plan, pipe: Any = None) -> list[dict[str, Any]]:
    """Make all shards of a plan in this process, and return their rows."""
    out, pipe = plan.folder.parent, pipe or batch.pipeline_of(plan)
    for number in range(len(plan)):
        batch.run_shard(out, plan, number, pipe)
    return rows_of(out)


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Return the rows of an output folder."""
    files = sorted((out / "rows").rglob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


def images_of(out: Path) -> dict[tuple[str, int], bytes]:
    """Return the file of each image by id and variation."""
    return {(row["id"], row["k"]): (out / row["file"]).read_bytes() for row in rows_of(out) if "file" in row}


def errors_of(out: Path) -> dict[str, str]:
    """Return the error of each input by id."""
    return {row["id"]: row["error"] for row in rows_of(out) if "error" in row}


class Stub:
    """A pipeline whose images show how it was called."""

    device = torch.device("cpu")

    def __init__(self):
        self.calls = []

    def encode_image(self, image, preprocess="clip"):
        return torch.ones(1, 1, 24)

    def __call__(self, **arguments):
        self.calls.append(arguments)
        rows = len(arguments["seed"])
        images = [drawing("fox") for _ in range(rows)]
        return imvar.StableDiffusionPipelineOutput(images, None, arguments["seed"], None, Records(rows))


class Records:
    def __init__(self, rows):
        self.rows = rows

    def finished(self):
        return [None] * self.rows
