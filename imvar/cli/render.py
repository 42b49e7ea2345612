"""Make the images of a command, save and report them, and save the contact sheet."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ..contact_sheet import SheetRow, contact_sheet
from ..image.load_image import load_image
from ..weights.bundled import bundled_examples
from .checkpoint import is_emoji, load_pipeline, pick_device, pick_dtype, set_scheduler
from .choices import CHECKPOINT, EMOJI, EMOJI_STEPS, FLAG_NOTES, STEPS
from .outputs import OutputFolder
from .rows import Cell, Row
from .sources import InputImage, read_source, read_sources

EMOJI_NOTICE = (
    f"{EMOJI} was trained on drawings in the style of emoji, of objects, animals, food, vehicles and faces, not on "
    f"photographs; for those use --checkpoint {CHECKPOINT}, a download of 6 GB"
)
SHEET = "contact-sheet.png"
EMOJI_SIZE = (64, 64)
ARGUMENTS = {"steps": "num_inference_steps", "guidance": "guidance_scale", "rescale": "guidance_rescale"}
"""Options of the command line whose arguments of the pipeline have other names."""


RowsOf = Callable[[argparse.Namespace, Sequence[InputImage]], list[Row]]


def make_images(args: argparse.Namespace, rows_of: RowsOf) -> None:
    """Make the images of a command; device, photos and names are checked before the checkpoint is loaded."""
    emoji = is_emoji(args.checkpoint)
    apply_defaults(args, emoji)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    sources = read_sources(args.photos)
    negative = read_source(args.negative, "negative") if args.negative else None
    shared = shared_options(args)
    rows = rows_of(args, sources)
    names = [SHEET, *(f"{cell.stem}.png" for row in rows for cell in row.cells)]
    inputs = [*args.photos, *(path for path in (args.negative, args.init, args.mask) if path)]
    outputs = OutputFolder(args.out, names, args.overwrite, inputs)
    if emoji:
        print(f"imvar: {EMOJI_NOTICE}", file=sys.stderr)
        if args.size[0] and args.size != EMOJI_SIZE:
            print(
                f"imvar: {EMOJI} was trained at 64x64 pixels; at other sizes its images rarely show an object, and "
                "larger ones take longer",
                file=sys.stderr,
            )
    pipe = load_pipeline(args.checkpoint, args.revision, args.scheduler, dtype).to(device)
    if negative:
        shared["negative_image_embeds"] = negative.embed(pipe)

    sheet_rows = [SheetRow(row.name, row.photo) for row in rows]
    for row, sheet_row in zip(rows, sheet_rows, strict=True):
        pipe.set_progress_bar_config(desc=row.name)
        for cell, image, flagged in images_of(pipe, row.cells, shared, args.batch):
            note = ", flagged" if flagged else ""
            path = outputs.save(f"{cell.stem}.png", partial(image.save, format="PNG"))
            sheet_row.variations.append((cell.caption + note, image))
            print(f"{path}{note} by the safety checker{FLAG_NOTES[args.on_flagged]}" if flagged else path)

    sheet = outputs.save(SHEET, partial(contact_sheet(sheet_rows, footer_of(args, pipe, rows)).save, format="PNG"))
    print(sheet, "(the photos with their variations)")
    if pipe.safety_checker is None:
        print("imvar: this checkpoint has no safety checker; the images were not checked", file=sys.stderr)


def footer_of(args: argparse.Namespace, pipe: Any, rows: Sequence[Row]) -> str:
    """Return the settings that all images share, for the foot of the contact sheet."""
    settings = {
        "steps": f"{args.steps} step{'s' * (args.steps > 1)}",
        "scheduler": type(pipe.scheduler).__name__.removesuffix("Scheduler"),
        "guidance": f"guidance {args.guidance:g}",
    }
    varied = {name for row in rows for cell in row.cells for name in cell.options}
    return ", ".join([*(text for name, text in settings.items() if name not in varied), args.checkpoint])


def shared_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the pipeline for all images."""
    options = {
        "height": args.size[0],
        "width": args.size[1],
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "on_flagged": args.on_flagged,
    }
    if args.init:
        options |= {"init_image": load_image(args.init), "strength": args.strength}
    elif args.strength is not None:
        args.usage_error("--strength: expected --init with it, got none")
    if args.mask:
        options |= {"mask_image": load_image(args.mask), "paste": True}
    return options


def images_of(
    pipe: Any, cells: Sequence[Cell], shared: dict[str, Any], batch: int
) -> Iterator[tuple[Cell, Image, bool]]:
    """Yield each cell, its image and the safety checker's flag; cells that differ by seed are computed together."""
    for (condition, options), group in groupby(cells, key=lambda cell: (cell.condition, cell.options)):
        if scheduler := options.get("scheduler"):
            set_scheduler(pipe, scheduler)
        own = {ARGUMENTS.get(name, name): value for name, value in options.items() if name != "scheduler"}
        while together := list(islice(group, batch)):
            seeds = [cell.seed for cell in together]
            output = pipe(**condition(pipe), **(shared | own), num_images_per_prompt=len(seeds), seed=seeds)
            yield from zip(together, output.images, output.nsfw_content_detected or [False] * len(seeds), strict=True)


def apply_defaults(args: argparse.Namespace, emoji: bool) -> None:
    """Fill in the options whose defaults depend on the checkpoint: photos, steps and dtype."""
    if args.photos is None:  # those of `imvar mix`
        args.photos, args.weights = map(list, zip(*args.weighted, strict=True))
    args.steps = args.steps or (EMOJI_STEPS if emoji else STEPS)
    if emoji and args.dtype == "auto":  # for the same images as from the Python API, on any machine
        args.dtype = "float32"
    if emoji and not args.photos:
        args.photos = list(bundled_examples(EMOJI).values())
    if not args.photos:
        path = Path(EMOJI).absolute()
        shadowed = f"; {path} takes precedence over the bundled checkpoint" if args.checkpoint == EMOJI else ""
        args.usage_error(
            f"PHOTO: expected at least one, got none; name one, or use --checkpoint {EMOJI}, which has example "
            f"drawings{shadowed}"
        )
