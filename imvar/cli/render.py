"""Prepare a command that makes images: read and check its inputs, load the checkpoint, lay out its sheets."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..choices import CHECKPOINT, EMOJI, EMOJI_STEPS, STEPS
from ..loading import is_emoji, load_pipeline, pick_device, pick_dtype, prefer_one_thread
from ..weights.bundled import bundled_examples
from .outputs import OutputFolder
from .printer import Printer
from .renderer import Renderer, file_name
from .rows import Row
from .sources import InputImage, read_photo, read_source, read_sources

EMOJI_NOTICE = (
    f"{EMOJI} was trained on drawings in the style of emoji, of objects, animals, food, vehicles and faces, not on "
    f"photographs; for those use --checkpoint {CHECKPOINT}, a download of 6 GB"
)
SHEET = "contact-sheet.png"
SHEET_ROWS, SHEET_CELLS = 40, 400  # more go on further sheets
EMOJI_SIZE = (64, 64)
EMOJI_SIZE_NOTICE = (
    f"{EMOJI} was trained at 64x64 pixels; at other sizes its images rarely show an object, and larger ones take longer"
)

RowsOf = Callable[[argparse.Namespace, Sequence[InputImage]], list[Row]]


def make_images(args: argparse.Namespace, rows_of: RowsOf) -> None:
    """Make the images of a command; device, photos and names are checked before the checkpoint is loaded."""
    emoji = is_emoji(args.checkpoint)
    apply_defaults(args, emoji)
    if emoji and args.own_process:
        prefer_one_thread()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    with Printer(args.quiet, args.json) as printer:
        sources = read_sources(args.photos, printer.reading)
        negative = read_source(args.negative, "negative") if args.negative else None
        shared = shared_options(args)
        rows = rows_of(args, sources)
        pages = pages_of(rows)
        sheets = sheet_names(len(pages))
        names = [*sheets, *(file_name(cell, args.save) for row in rows for cell in row.cells)]
        inputs = [*args.photos, *(path for path in (args.negative, args.init, args.mask) if path)]
        outputs = OutputFolder(args.out, names, args.overwrite, inputs)
        if emoji:
            printer.note(EMOJI_NOTICE)
            if args.size[0] and args.size != EMOJI_SIZE:
                printer.note(EMOJI_SIZE_NOTICE)
        pipe = load_pipeline(args.checkpoint, args.revision, args.scheduler, dtype).to(device)
        if negative:
            shared["negative_image_embeds"] = negative.embed(pipe)
        renderer = Renderer(args, pipe, shared, outputs, printer)
        if args.skip_existing:
            renderer.find_existing(rows)
        renderer.announce(rows)
        footer = footer_of(args, pipe, rows)
        for name, page in zip(sheets, pages, strict=True):
            renderer.make_page(name, page, footer)
        if pipe.safety_checker is None:
            printer.note("this checkpoint has no safety checker; the images were not checked")


def pages_of(rows: Sequence[Row]) -> list[Sequence[Row]]:
    """Return the rows of each contact sheet."""
    columns = max(len(row.cells) for row in rows)
    n = max(1, min(SHEET_ROWS, SHEET_CELLS // columns))
    return [rows[i : i + n] for i in range(0, len(rows), n)]


def sheet_names(pages: int) -> list[str]:
    """Return the names of the contact sheets."""
    return [SHEET] if pages == 1 else [f"contact-sheet-{k}of{pages}.png" for k in range(1, pages + 1)]


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
        options |= {"init_image": read_photo("--init", args.init), "strength": args.strength}
    if args.mask:
        options |= {"mask_image": read_photo("--mask", args.mask, is_mask=True), "paste": True}
    return options


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
