"""`imvar again`: make an image again from the record in its file, and compare both."""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageChops

from ..errors import InputError, invalid
from ..loading import HUB_ID, pick_device
from ..records.files import read_record, write_image
from ..records.remaking import inexactness, obstacles
from ..weights.bundled import BUNDLED
from .outputs import OutputFolder
from .remake import (
    compare_records,
    load_recorded,
    match_inputs,
    process_as_recorded,
    read_inputs,
    recorded_call,
)


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 1 if the image should be equal in every pixel and is not, or cannot be made."""
    record = read_record(args.file)
    if reasons := obstacles(record):
        raise invalid(InputError, args.file, "an image that can be made again", "; ".join(reasons))
    options = {"--photo": args.photos, "--negative": [args.negative], "--init": [args.init], "--mask": [args.mask]}
    inputs = match_inputs(record, {name: read_inputs(name, paths) for name, paths in options.items()})
    checkpoint = args.checkpoint or recorded_checkpoint(record)
    name = f"{args.file.stem}-again.png"
    outputs = OutputFolder(args.out, [name], overwrite=False, inputs=[args.file])
    device = recorded_device(record)
    with process_as_recorded(record["machine"]):
        pipe = load_recorded(record, checkpoint, device)
        pipe.set_progress_bar_config(desc=args.file.name, leave=False, disable=None)  # without a terminal
        arguments = recorded_call(record, inputs, pipe, args.alone)
        row = 0 if args.alone else record["call"]["row"]
        rounded = inexactness(record) + compare_records(record, pipe.records(**arguments)[row])
        if rounded:
            print(f"imvar: equal only up to rounding (recorded and here): {'; '.join(rounded)}", file=sys.stderr)
        made = pipe(**arguments)
        record = made.records[row]
    image = made.images[row]
    print(outputs.save_as(name, partial(write_image, image, record=record)))
    text, is_equal = compare_images(args.file, image)
    print(text)
    return 0 if is_equal or rounded else 1


def recorded_checkpoint(record: dict[str, Any]) -> str:
    """Return the checkpoint that a record names, if it is a hub id, a bundled one or in the working folder."""
    name = record["checkpoint"]["name"]
    is_plain = isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\:]", name)
    if isinstance(name, str) and (HUB_ID.fullmatch(name) or name in BUNDLED or (is_plain and Path(name).exists())):
        return name
    got = f"{name!r}, which is not here" if name else "none"
    raise invalid(InputError, "--checkpoint", "the checkpoint that the image was made with", got)


def recorded_device(record: dict[str, Any]) -> torch.device:
    """Return the recorded device, or the fastest one where there is none of that kind."""
    try:
        return pick_device(record["machine"]["device"])
    except InputError:
        return pick_device("auto")


def compare_images(path: Path, image: Image.Image) -> tuple[str, bool]:
    """Return how an image differs from that in a file, and whether they are equal."""
    with Image.open(path) as file:
        old, is_lossy = file.convert("RGB"), file.format == "JPEG"
    if old.size != image.size:
        return f"of another size than {path}, {image.width}x{image.height}: {path} was changed", False
    difference = ImageChops.difference(old, image.convert("RGB"))
    levels = max(channel.getextrema()[1] for channel in difference.split())
    if not levels:
        return f"equal in every pixel to {path}", True
    note = ", which is a JPEG and so not exact" if is_lossy else ""
    return f"differs by at most {levels} of 255 levels from {path}{note}", is_lossy
