"""Make the images of a command, save and printer them, and save the contact sheet."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from ..contact_sheet import SheetRow, as_on_sheet, contact_sheet
from ..weights.bundled import bundled_examples
from .checkpoint import is_emoji, load_pipeline, pick_device, pick_dtype, set_scheduler
from .choices import CHECKPOINT, EMOJI, EMOJI_STEPS, FLAG_NOTES, STEPS
from .outputs import OutputFolder
from .printer import Printer
from .rows import Cell, Row
from .sources import InputImage, read_photo, read_source, read_sources

EMOJI_NOTICE = (
    f"{EMOJI} was trained on drawings in the style of emoji, of objects, animals, food, vehicles and faces, not on "
    f"photographs; for those use --checkpoint {CHECKPOINT}, a download of 6 GB"
)
SHEET = "contact-sheet.png"
SHEET_ROWS = 40  # more go on further sheets
EMOJI_SIZE = (64, 64)
EMOJI_SIZE_NOTICE = (
    f"{EMOJI} was trained at 64x64 pixels; at other sizes its images rarely show an object, and larger ones take longer"
)
ARGUMENTS = {"steps": "num_inference_steps", "guidance": "guidance_scale", "rescale": "guidance_rescale"}
"""Options of the command line whose arguments of the pipeline have other names."""


RowsOf = Callable[[argparse.Namespace, Sequence[InputImage]], list[Row]]


def make_images(args: argparse.Namespace, rows_of: RowsOf) -> None:
    """Make the images of a command; device, photos and names are checked before the checkpoint is loaded."""
    emoji = is_emoji(args.checkpoint)
    apply_defaults(args, emoji)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    with Printer(args.quiet, args.json) as printer:
        sources = read_sources(args.photos)
        negative = read_source(args.negative, "negative") if args.negative else None
        shared = shared_options(args)
        rows = rows_of(args, sources)
        pages = [rows[i : i + SHEET_ROWS] for i in range(0, len(rows), SHEET_ROWS)]
        sheets = sheet_names(len(pages))
        cells = [cell for row in rows for cell in row.cells]
        inputs = [*args.photos, *(path for path in (args.negative, args.init, args.mask) if path)]
        outputs = OutputFolder(args.out, [*sheets, *map(file_name, cells)], args.overwrite, inputs)
        if emoji:
            printer.note(EMOJI_NOTICE)
            if args.size[0] and args.size != EMOJI_SIZE:
                printer.note(EMOJI_SIZE_NOTICE)
        pipe = load_pipeline(args.checkpoint, args.revision, args.scheduler, dtype).to(device)
        if negative:
            shared["negative_image_embeds"] = negative.embed(pipe)
        printer.expect(len(cells), sum(len(batches_of(row.cells, args.batch)) for row in rows))
        footer = footer_of(args, pipe, rows)
        for name, page in zip(sheets, pages, strict=True):
            sheet_rows = [make_row(row, pipe, shared, outputs, printer, args, name) for row in page]
            printer.sheet(outputs.save_as(name, partial(contact_sheet(sheet_rows, footer).save, format="PNG")))
        if pipe.safety_checker is None:
            printer.note("this checkpoint has no safety checker; the images were not checked")


def make_row(
    row: Row,
    pipe: Any,
    shared: dict[str, Any],
    outputs: OutputFolder,
    printer: Printer,
    args: argparse.Namespace,
    sheet: str,
) -> SheetRow:
    """Make and save the images of a row, and return the row of the contact sheet."""
    sheet_row = SheetRow(row.name, row.photo())
    for cells in batches_of(row.cells, args.batch):
        pipe.progress_bar = partial(printer.call_bar, row.name, len(cells))
        output = variations_of(pipe, cells, shared)
        for k, (cell, image) in enumerate(zip(cells, output.images, strict=True)):
            flagged = output.nsfw_content_detected[k] if output.nsfw_content_detected else None
            path = outputs.save_as(file_name(cell), partial(image.save, format="PNG"))
            sheet_row.variations.append((cell.caption + (", flagged" if flagged else ""), as_on_sheet(image)))
            details = {
                "seed": cell.seed,
                "source": row.source,
                "scores": output.scores[k] if output.scores else None,
                "sheet": str(outputs.free_path(sheet)),
            }
            printer.image(path, flagged, FLAG_NOTES[args.on_flagged], details)
    return sheet_row


def file_name(cell: Cell) -> str:
    """Return the name of the file of a cell."""
    return f"{cell.stem}.png"


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


def batches_of(cells: Sequence[Cell], batch: int) -> list[list[Cell]]:
    """Return the cells that are computed together: those that differ by seed, up to `batch` at a time."""
    groups = [list(group) for _, group in groupby(cells, key=lambda cell: (cell.condition, cell.options))]
    return [group[i : i + batch] for group in groups for i in range(0, len(group), batch)]


def variations_of(pipe: Any, cells: Sequence[Cell], shared: dict[str, Any]) -> Any:
    """Return the output of a call that makes the images of cells that differ by seed."""
    condition, options = cells[0].condition, cells[0].options
    if scheduler := options.get("scheduler"):
        set_scheduler(pipe, scheduler)
    own = {ARGUMENTS.get(name, name): value for name, value in options.items() if name != "scheduler"}
    seeds = [cell.seed for cell in cells]
    return pipe(**condition(pipe), **(shared | own), num_images_per_prompt=len(seeds), seed=seeds)


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
