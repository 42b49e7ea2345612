"""The processes that work on a batch, and their claims on shards.

A claim keeps other workers from making the same shard. It is advice alone: a claim that is wrongly taken over costs
work, and no result, since whoever makes a shard writes the same bytes.
"""

from __future__ import annotations

import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from .bucket import BucketPath, Location
from .processes import gives_signs, lives_here, process_name, read_text
from .store import TEMPORARY, Store, in_folder, listed

HEARTBEAT = 5.0  # seconds between the signs of life of a worker
CLAIM = "claim"


class Worker:
    """This process as a worker on a batch: within its context it gives signs of life, and has a folder of its own."""

    def __init__(self, folder: Path):
        self.name = process_name()
        self.folder = folder / "workers" / self.name
        self.store = Store(folder, self.folder)
        self.claims = folder / "claims"
        self.ended = threading.Event()
        self.signs = threading.Thread(target=self.give_signs, daemon=True)

    def __enter__(self) -> Worker:
        with self.store.explain_full_disk():
            in_folder(self.folder, lambda: self.folder.mkdir(exist_ok=True))
        self.signs.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.ended.set()
        self.signs.join()  # which may be about to make the folder again
        for name in listed(self.claims):
            self.remove_claim(name, self.name)
        self.store.remove_temporary()
        with suppress(OSError):  # there are other workers
            self.claims.rmdir()

    def give_signs(self) -> None:
        """Set the time of the worker's folder, by the clock of the file system, until the end."""
        while not self.ended.wait(HEARTBEAT):
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)  # this process was counted as dead, as it was suspended
                os.utime(self.folder)

    # Claims

    def claim(self, number: int) -> bool:
        """Claim a shard, and return whether that succeeded: it was free, or its owner is dead."""
        path = self.claims / f"{number:07d}"
        with self.store.explain_full_disk():
            if self.place_claim(path):
                return True
            owner = self.owner(path.name)
            if owner == self.name:
                return True
            if owner is None or self.is_owner_alive(path.name, owner):
                return False
            self.remove_claim(path.name, owner)
            return self.place_claim(path)

    def place_claim(self, path: Path) -> bool:
        """Write the name of this worker to the file of a claim, at once and whole; return whether there was none."""
        own = self.folder / CLAIM
        if not own.exists():
            in_folder(own, lambda: own.write_text(self.name, encoding="ascii"))
        try:
            in_folder(path, lambda: os.link(own, path))
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links, or a full one
            return self.write_claim(path)
        return True

    def write_claim(self, path: Path) -> bool:
        """Write a claim in two steps, of which the first is at once; return whether there was none."""
        try:
            file = path.open("x", encoding="ascii")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(self.name)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return True

    def release(self, number: int) -> None:
        """Give up a claim, unless another worker has taken it over."""
        self.remove_claim(f"{number:07d}", self.name)

    def remove_claim(self, name: str, owner: str) -> None:
        """Remove a claim if it is that of `owner`, and not by now the one of a worker that has taken it over."""
        taken = self.folder / f"{CLAIM}-{os.urandom(8).hex()}"
        try:
            if self.owner(name) == owner:
                (self.claims / name).rename(taken)  # of several processes one succeeds
        except OSError:
            return
        with suppress(OSError):
            if read_text(taken) != owner:
                os.link(taken, self.claims / name)
        with suppress(OSError):
            taken.unlink()

    def owner(self, name: str) -> str | None:
        """Return the name of the worker that has a claim: None for one that was given up, empty while it is written."""
        return read_text(self.claims / name)

    def is_owner_alive(self, name: str, owner: str) -> bool:
        """Return whether the owner of a claim lives."""
        return self.is_alive(owner) if owner else gives_signs(self.claims / name, self.folder)

    def is_alive(self, name: str, path: Path | None = None) -> bool:
        """Return whether a worker lives: on this machine by its process, on others by its last sign of life.

        `path`: the file or folder whose time is that sign, the folder of the worker by default.
        """
        here = lives_here(name)
        return gives_signs(path or self.folder.parent / name, self.folder) if here is None else here

    def alive(self) -> list[str]:
        """Return the names of the living workers, this one aside."""
        return [name for name in listed(self.folder.parent) if name != self.name and self.is_alive(name)]

    # What dead processes have left

    def remove_dead(self) -> None:
        """Remove the claims of dead workers, and the folders with incomplete files of those of this machine."""
        for name in listed(self.claims):
            owner = self.owner(name)
            if owner is not None and owner != self.name and not self.is_owner_alive(name, owner):
                self.remove_claim(name, owner)
        for name in listed(self.folder.parent):
            if lives_here(name) is False:
                shutil.rmtree(self.folder.parent / name, ignore_errors=True)

    def clean_up(self) -> None:
        """Remove everything that dead processes have left, once all shards are done."""
        self.remove_dead()
        for name in listed(self.folder.parent):
            if name != self.name and not self.is_alive(name):
                remove_any(self.folder.parent / name)
        folder = self.folder.parent.parent
        for path in (*folder.glob(".plan.*.tmp"), *(folder / "plan").glob(".*.tmp")):
            if not self.is_alive(path.suffixes[-2][1:] if len(path.suffixes) > 1 else "", path):
                remove_any(path)
        journals = folder / "journal"
        for name in listed(journals):
            number = name.partition(".")[0]
            if not number.isdecimal() or self.store.is_done(int(number)):
                remove_any(journals / name)
        with suppress(OSError):
            journals.rmdir()


class LoneWorker:
    """This process as a worker in an object store, where workers do not see each other: each has its own shards."""

    def __init__(self, folder: BucketPath):
        self.store = Store(folder)

    def __enter__(self) -> LoneWorker:
        return self

    def __exit__(self, *error: Any) -> None:
        self.store.remove_temporary()

    def claim(self, number: int) -> bool:
        return True

    def release(self, number: int) -> None:
        pass

    def alive(self) -> None:
        """Return None: which workers are alive is unknown."""

    def remove_dead(self) -> None:
        """Remove the temporary files of dead processes of this machine."""
        folder = self.store.temporary.parent
        for name in listed(folder):
            if name.startswith(TEMPORARY) and lives_here(name.removeprefix(TEMPORARY)) is False:
                shutil.rmtree(folder / name, ignore_errors=True)

    clean_up = remove_dead


def worker_of(folder: Location) -> Worker | LoneWorker:
    """Return this process as a worker in an output folder."""
    return LoneWorker(folder) if isinstance(folder, BucketPath) else Worker(folder)


def remove_any(path: Path) -> None:
    """Remove a file or a folder, if that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
