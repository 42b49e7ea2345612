"""The output of a command: paths or JSON on stdout; notes and, on a terminal, progress on stderr."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, tqdm

T = TypeVar("T")

MAX_NAME = 30  # characters
WHOLE = "{desc} images {percentage:3.0f}%|{bar}| {remaining} left"


class Printer:
    """Prints for one command. Within its context, warnings are notes.

    `quiet` leaves errors and JSON, `as_json` prints an object for each image in place of paths.
    """

    def __init__(self, quiet: bool = False, as_json: bool = False):
        self.quiet, self.as_json = quiet, as_json
        self.images = self.calls = self.done = 0
        self.whole: Any = None  # the bar of all images
        # Not disable=False on a terminal, as that would take precedence over TQDM_DISABLE.
        self.bar_options: dict[str, Any] = {"leave": False, "dynamic_ncols": True}
        if quiet or not sys.stderr.isatty():
            self.bar_options["disable"] = True

    def __enter__(self) -> Printer:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.showwarning = lambda message, *_, **__: self.note(str(message))
        self._hides_downloads = self.quiet and not are_progress_bars_disabled()
        if self._hides_downloads:
            disable_progress_bars()
        return self

    def __exit__(self, *error: Any) -> None:
        self._warnings.__exit__(*error)
        if self._hides_downloads:
            enable_progress_bars()
        if self.whole is not None:
            self.whole.close()

    def reading(self, files: Iterable[T]) -> Iterable[T]:
        """Return the files with a bar, which is shown if reading them takes more than a moment."""
        return tqdm(files, desc="reading photos", delay=1, **self.bar_options)

    def expect(self, images: int, calls: int) -> None:
        """Set how many images are made, in how many calls of the pipeline."""
        self.images, self.calls = images, calls

    @contextmanager
    def call_bar(self, name: str, images: int, total: int) -> Iterator[CallBar]:
        """Yield the bar of a call that makes some images in `total` steps, each of which also moves that of all."""
        if self.whole is None and self.calls > 1:
            options = self.bar_options | {"bar_format": WHOLE, "smoothing": 0, "miniters": 0}
            self.whole = tqdm(total=self.images, desc=f"0/{self.images}", **options)
        with tqdm(total=total, desc=short_name(name), **self.bar_options) as bar:
            yield CallBar(bar, self.whole, images / total)

    def note(self, text: str) -> None:
        """Print a line about the command on stderr."""
        if not self.quiet:
            print_above_bars(f"imvar: {text}", sys.stderr)

    def image(self, path: Path, note: str, details: dict[str, Any]) -> None:
        """Print the path of a saved image, with a note if it is flagged, or an object of it with `details`."""
        self.done += 1
        if self.whole is not None:
            self.whole.set_description_str(f"{self.done}/{self.images}")
        if self.as_json:
            print_above_bars(json.dumps({"path": str(path)} | details | {"kept": False}), sys.stdout)
        elif not self.quiet:
            text = f"{path}, flagged by the safety checker{note}" if details["flagged"] else str(path)
            print_above_bars(text, sys.stdout)

    def existing_image(self, path: Path, details: dict[str, Any]) -> None:
        """Print the path of an image that is kept."""
        if self.as_json:
            print_above_bars(json.dumps({"path": str(path)} | details | {"kept": True}), sys.stdout)
        elif not self.quiet:
            print_above_bars(f"{path}, kept", sys.stdout)

    def sheet(self, path: Path) -> None:
        """Print the path of a saved contact sheet."""
        if not self.quiet and not self.as_json:
            print_above_bars(f"{path} (the photos with their variations)", sys.stdout)


class CallBar:
    """The bar of a call, as the pipeline moves it."""

    def __init__(self, bar: Any, whole: Any, share: float):
        self.bar, self.whole, self.share = bar, whole, share

    def update(self, n: int = 1) -> None:
        self.bar.update(n)
        if self.whole is not None:
            self.whole.update(n * self.share)


def short_name(name: str) -> str:
    """Return a name as a bar has room for it, in characters that stderr can encode."""
    encoding = getattr(sys.stderr, "encoding", None) or "ascii"
    name = name.encode(encoding, "replace").decode(encoding)
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME // 2]}...{name[3 - MAX_NAME // 2 :]}"


def print_above_bars(text: str, file: Any) -> None:
    """Print a line at once, even into a pipe, above the bars that a terminal shows."""
    with tqdm.external_write_mode(file=file):
        print(text, file=file, flush=True)
