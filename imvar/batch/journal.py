"""The journal of a shard: which calls were begun, so that an input that kills every process is found and left out.

A line is written before the inputs of a call are opened, since decoders can kill a process as well, and another one
after the call.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress

from .bucket import BucketPath, Location
from .store import Store, in_folder, json_lines


class Journal:
    """The journal of one shard. `deaths`: by id of an input, how often a process died in a call with it."""

    def __init__(self, store: Store, number: int):
        self.store, self.path = store, path_of(store.folder, number)
        self.deaths: Counter[str] = Counter()
        begun: list[str] = []
        for line in json_lines(self.path):
            if "begin" in line:
                self.deaths.update(begun)
                begun = line["begin"]
            elif "end" in line:
                for item in line["end"]:
                    self.deaths.pop(item, None)
                begun = []
            else:
                begun = []  # stopped on request
        self.deaths.update(begun)

    def note_begin(self, items: Iterable[str]) -> None:
        """Note that a call with these inputs begins."""
        self.append_line("begin", list(items))

    def note_end(self, items: Iterable[str]) -> None:
        """Note that a call has ended, with images or with errors."""
        self.append_line("end", list(items))

    def note_stop(self) -> None:
        """Note that the process ends on request, and not by an input."""
        self.append_line("stop", [])

    def append_line(self, event: str, items: list[str]) -> None:
        line = b"\n" + json.dumps({event: items}).encode() + b"\n"  # first the end of one that was cut
        with self.store.explain_full_disk():
            in_folder(self.path, lambda: append_bytes(self.path, line))

    def discard(self) -> None:
        """Remove the journal of a finished shard."""
        with suppress(OSError):
            self.path.unlink()
        with suppress(OSError):
            self.path.parent.rmdir()


def append_bytes(path: Location, data: bytes) -> None:
    """Append bytes to a file, in one piece where other processes do so too; in an object store none may."""
    if isinstance(path, BucketPath):
        path.write_bytes((path.read_bytes() if path.exists() else b"") + data)
        return
    with path.open("ab", buffering=0) as file:
        file.write(data)


def path_of(folder: Location, number: int) -> Location:
    """Return the path of the journal of a shard."""
    return folder / "journal" / f"{number:07d}.jsonl"
