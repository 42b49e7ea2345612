"""Names of processes that work on a batch, from which every other process can tell whether they are still alive."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import time
from contextlib import suppress
from pathlib import Path

STALE = 60.0  # seconds without a sign of life from which on a process of another machine counts as dead


def process_name(pid: int | None = None) -> str:
    """Return a new name of a process, this one by default: host, machine, process number and start, and a random part.

    It is a name for a file. The start tells a process from an earlier one with its number.
    """
    pid = os.getpid() if pid is None else pid
    host = re.sub(r"[^A-Za-z0-9_]", "_", platform.node())[:50]
    return f"{host}-{machine()}-{pid}-{start_of(pid) or 0}-{os.urandom(4).hex()}"


@functools.lru_cache(maxsize=1)
def machine() -> str:
    """Return a digest of the host, its boot and the numbering of its processes; 0 where the system does not say."""
    boot = read_text(Path("/proc/sys/kernel/random/boot_id"))
    try:
        numbering = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbering = None
    if not boot or not numbering:
        return "0"
    return hashlib.sha256(f"{platform.node()}\n{boot}\n{numbering}".encode()).hexdigest()[:12]


def start_of(pid: int) -> str | None:
    """Return when a process began, in ticks of the kernel's clock; None if it is dead, or the system does not say."""
    stat = read_text(Path(f"/proc/{pid}/stat"))
    fields = stat.rpartition(")")[2].split() if stat else []
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else None  # those of dead processes


def lives_here(name: str) -> bool | None:
    """Return whether a process of this machine lives; None for a process of another one."""
    parts = name.split("-")
    if len(parts) != 5 or parts[1] != machine() or machine() == "0" or not parts[2].isdecimal():
        return None
    return start_of(int(parts[2])) == parts[3]


def gives_signs(path: Path, clock: Path | None = None) -> bool:
    """Return whether a file has changed within the last `STALE` seconds, or seems to change as soon in the future.

    `clock`: a file of this process in the same file system, whose clock may differ from that of this machine.
    """
    try:
        changed, now = path.stat().st_mtime, time.time()
        with suppress(OSError):
            if clock is not None:
                os.utime(clock)
                now = clock.stat().st_mtime
    except (OSError, ValueError):  # the latter for a name that is none
        return False
    return abs(now - changed) < STALE


def read_text(path: Path) -> str | None:
    """Return the content of a file in ASCII, without space around it; None if there is none."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
