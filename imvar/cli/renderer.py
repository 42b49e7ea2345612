"""Make, save and report the images of a command, row by row, and its contact sheets."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from ..atomic.file import numbered_names
from ..choices import FLAG_NOTES
from ..contact_sheet import SheetRow, as_on_sheet, contact_sheet
from ..errors import InputError, invalid
from ..image.load_image import load_image
from ..loading import set_scheduler
from ..records.files import read_record, write_image
from ..records.record import differences
from .outputs import OutputFolder
from .printer import Printer
from .rows import Cell, Row

ARGUMENTS = {"steps": "num_inference_steps", "guidance": "guidance_scale", "rescale": "guidance_rescale"}
"""Options of the command line whose arguments of the pipeline have other names."""

OF_OPTIONS = {
    "call.rows": "images made together (-n, --batch)",
    "call.row": "place among the images made together, from 0 (-n, --batch, --seed)",
    "call.images": "photos varied together",
}
"""What entries of records mean in terms of options of the command line."""


@dataclass
class Renderer:
    """Makes, saves and reports the images of a command.

    `existing`: the paths of images that are kept, by the cells' stems, with whether they are flagged.
    """

    args: argparse.Namespace
    pipe: Any
    shared: dict[str, Any]
    outputs: OutputFolder
    printer: Printer
    existing: dict[str, tuple[Path, bool | None]] = field(default_factory=dict)

    def find_existing(self, rows: Sequence[Row]) -> None:
        """Find the images that exist; raise `InputError` for one that this command would make otherwise."""
        for row in self.printer.reading(rows):
            for cells in batches_of(row.cells, self.args.batch):
                paths = [self.outputs.folder / file_name(cell, self.args.save) for cell in cells]
                if not any(map(os.path.lexists, paths)):
                    continue
                records = self.pipe.records(**batch_arguments(self.pipe, cells, self.shared))
                for cell, path, record in zip(cells, paths, records, strict=True):
                    if os.path.lexists(path):
                        self.existing[cell.stem] = path, same_record(path, record).get("flagged")

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """Return the cells whose images do not exist."""
        return [cell for cell in cells if cell.stem not in self.existing]

    def announce(self, rows: Sequence[Row]) -> None:
        """Tell the progress bar how many images are made, in how many calls."""
        batches = [self.missing(cells) for row in rows for cells in batches_of(row.cells, self.args.batch)]
        self.printer.expect(sum(map(len, batches)), len(list(filter(None, batches))))

    def make_page(self, name: str, rows: Sequence[Row], footer: str) -> None:
        """Make the images of rows and their contact sheet."""
        is_complete = not any(self.missing(row.cells) for row in rows)
        same = self.same_sheet(name, rows, footer) if is_complete else None
        sheet = same or self.outputs.free_path(name)
        sheet_rows = [self.make_row(row, sheet) for row in rows]
        if not same:
            image = contact_sheet(sheet_rows, footer)
            sheet = self.outputs.save_as(name, partial(image.save, format="PNG"))
        self.printer.sheet(sheet)

    def same_sheet(self, name: str, rows: Sequence[Row], footer: str) -> Path | None:
        """Return the path of a contact sheet of existing images, if it exists as well."""
        sheet_rows = [SheetRow(row.name, row.photo(), list(map(self.existing_variation, row.cells))) for row in rows]
        sheet = contact_sheet(sheet_rows, footer)
        for numbered in numbered_names(*os.path.splitext(name)):
            path = self.outputs.folder / numbered
            if not path.is_file():
                return None
            if has_pixels(path, sheet):
                return path
        return None

    def make_row(self, row: Row, sheet: Path) -> SheetRow:
        """Make and save the images of a row, and return the row of the contact sheet.

        If some images of a batch exist, all are made again, since their bits depend on the size of the batch, and only
        the others are saved.
        """
        sheet_row = SheetRow(row.name, row.photo())
        for cells in batches_of(row.cells, self.args.batch):
            output = self.run_batch(row, cells) if self.missing(cells) else None
            for k, cell in enumerate(cells):
                details = {"seed": cell.seed, "source": row.source, "sheet": str(sheet)}
                if cell.stem in self.existing:
                    sheet_row.variations.append(self.existing_variation(cell))
                    path, flagged = self.existing[cell.stem]
                    self.printer.existing_image(path, details | {"flagged": flagged, "scores": None})
                else:
                    sheet_row.variations.append(self.save_variation(cell, output, k, details))
        return sheet_row

    def run_batch(self, row: Row, cells: Sequence[Cell]) -> Any:
        """Return the output of a call of the pipeline that makes these cells."""
        self.pipe.progress_bar = partial(self.printer.call_bar, row.name, len(self.missing(cells)))
        return self.pipe(**batch_arguments(self.pipe, cells, self.shared))

    def save_variation(self, cell: Cell, output: Any, k: int, details: dict[str, Any]) -> tuple[str, Image.Image]:
        """Save and report image k of an output, and return its caption and the image as on the contact sheet."""
        image, flags = output.images[k], output.nsfw_content_detected
        record = None if self.args.no_metadata else output.records[k]
        write = partial(write_image, image, record=record, format=self.args.save)
        path = self.outputs.save_as(file_name(cell, self.args.save), write)
        flagged = flags[k] if flags else None
        scores = output.scores[k] if output.scores else None
        self.printer.image(path, FLAG_NOTES[self.args.on_flagged], details | {"flagged": flagged, "scores": scores})
        return caption_of(cell, flagged), as_on_sheet(image)

    def existing_variation(self, cell: Cell) -> tuple[str, Image.Image]:
        """Return the caption and the image of an existing file, as on the contact sheet."""
        path, flagged = self.existing[cell.stem]
        return caption_of(cell, flagged), as_on_sheet(load_image(path))


def caption_of(cell: Cell, flagged: bool | None) -> str:
    """Return the caption of an image on the contact sheet."""
    return cell.caption + (", flagged" if flagged else "")


def same_record(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a file; raise `InputError` if it differs from the expected one."""
    found = read_record(path)
    if differing := differences(found, expected):
        got = f"another (its value and this command's): {'; '.join(map(with_option, differing))}"
        hint = "use another -o FOLDER, or --overwrite"
        raise invalid(InputError, path, "the image that this command makes", got, hint)
    return found


def with_option(difference: str) -> str:
    """Return a difference of records with the options of the command line that it follows from."""
    name, _, values = difference.partition(": ")
    return f"{OF_OPTIONS.get(name, name)}: {values}"


def has_pixels(path: Path, image: Image.Image) -> bool:
    """Return whether a file contains this RGB image."""
    try:
        with Image.open(path, formats=["PNG"]) as file:
            return file.size == image.size and file.convert("RGB").tobytes() == image.tobytes()
    except Exception:  # of a broken file Pillow raises many kinds
        return False


def file_name(cell: Cell, format: str) -> str:
    """Return the name of the file of a cell."""
    return f"{cell.stem}.{format}"


def batches_of(cells: Sequence[Cell], batch: int) -> list[list[Cell]]:
    """Return the cells that are computed together: those that differ by seed, up to `batch` at a time."""
    groups = [list(group) for _, group in groupby(cells, key=lambda cell: (cell.condition, cell.options))]
    return [group[i : i + batch] for group in groups for i in range(0, len(group), batch)]


def batch_arguments(pipe: Any, cells: Sequence[Cell], shared: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the call that makes cells which differ by seed, and set its scheduler."""
    condition, options = cells[0].condition, cells[0].options
    if scheduler := options.get("scheduler"):
        set_scheduler(pipe, scheduler)
    own = {ARGUMENTS.get(name, name): value for name, value in options.items() if name != "scheduler"}
    seeds = [cell.seed for cell in cells]
    return {**condition(pipe), **shared, **own, "num_images_per_prompt": len(seeds), "seed": seeds}
