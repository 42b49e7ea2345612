"""The processes that work on a batch, and their claims on shards.

A claim keeps other workers from making the same shard. It is advice alone: a claim that is wrongly taken over costs
work, and no result, since whoever makes a shard writes the same bytes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from .store import Store, listed

HEARTBEAT = 5.0  # seconds between the signs of life of a worker
STALE = 60.0  # seconds without one from which on a worker of another machine counts as dead


def identity_of_process(pid: int) -> dict[str, Any]:
    """Return what tells a process from all others: its machine, its number, and when it began."""
    return {
        "host": platform.node(),
        "boot": read_text("/proc/sys/kernel/random/boot_id"),
        "namespace": linked("/proc/self/ns/pid"),
        "pid": pid,
        "start": start_of(pid),
    }


def read_text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeError):
        return None


def linked(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def start_of(pid: int) -> str | None:
    """Return when a process began, in ticks of the kernel's clock; None where the system does not tell."""
    stat = read_text(f"/proc/{pid}/stat")
    fields = stat.rpartition(")")[2].split() if stat else []
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else None  # those of dead processes


class Worker:
    """This process as a worker on a batch: within its context it gives signs of life, and has a folder of its own."""

    def __init__(self, folder: Path):
        self.name = f"{platform.node()[:50]}-{os.getpid()}-{os.urandom(4).hex()}"
        self.folder = folder / "workers" / self.name
        self.store = Store(folder, self.folder)
        self.claims = folder / "claims"
        self.ended = threading.Event()

    def __enter__(self) -> Worker:
        self.folder.mkdir(parents=True)
        self.claims.mkdir(exist_ok=True)
        identity = json.dumps(identity_of_process(os.getpid()))
        (self.folder / "worker.json").write_text(identity, encoding="utf-8")
        threading.Thread(target=self.give_signs, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.ended.set()
        for name in listed(self.claims):
            if self.owner(name) == self.name:
                self.release(int(name))
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in (self.folder.parent, self.claims):
            with suppress(OSError):  # there are other workers
                folder.rmdir()

    def give_signs(self) -> None:
        """Set the time of the worker's file, by the clock of the file system, until the end."""
        while not self.ended.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(self.folder / "worker.json")

    # Claims

    def claim(self, number: int) -> bool:
        """Claim a shard, and return whether that succeeded: it was free, or its owner is dead."""
        path = self.claims / f"{number:07d}"
        self.claims.mkdir(exist_ok=True)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(self.name)
            return True
        except FileExistsError:
            owner = self.owner(path.name)
        if owner == self.name or (owner is not None and self.is_alive(owner)):
            return owner == self.name
        taken = self.folder / "claim"
        with suppress(OSError):
            taken.write_text(self.name, encoding="utf-8")
            taken.replace(path)
        return self.owner(path.name) == self.name

    def release(self, number: int) -> None:
        """Give up a claim."""
        with suppress(OSError):
            (self.claims / f"{number:07d}").unlink()

    def owner(self, name: str) -> str | None:
        """Return the name of the worker that has a claim; None for a claim that was given up or is being written."""
        return read_text(str(self.claims / name))

    def is_alive(self, name: str) -> bool:
        """Return whether a worker lives: on this machine by its process, on others by its last sign of life."""
        path = self.folder.parent / name / "worker.json" if name else None
        if path is None:  # the claim of a worker that was killed while it wrote the claim, or that writes it now
            return False
        try:
            identity = json.loads(path.read_text(encoding="utf-8"))
            here = identity_of_process(identity["pid"])
            machine = ("host", "boot", "namespace")
            if here["boot"] and all(here[key] == identity[key] for key in machine):
                return here["start"] is not None and here["start"] == identity["start"]
            own = self.folder / "worker.json"
            os.utime(own)
            return own.stat().st_mtime - path.stat().st_mtime < STALE
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def alive(self) -> list[str]:
        """Return the names of the living workers, this one aside."""
        return [name for name in listed(self.folder.parent) if name != self.name and self.is_alive(name)]

    def remove_dead(self) -> None:
        """Remove what dead workers left: their folders with incomplete files, and their claims."""
        for name in listed(self.claims):
            owner = self.owner(name)
            if owner != self.name and not (owner and self.is_alive(owner)):
                self.release(int(name))
        for name in listed(self.folder.parent):
            if name != self.name and not self.is_alive(name):
                shutil.rmtree(self.folder.parent / name, ignore_errors=True)
