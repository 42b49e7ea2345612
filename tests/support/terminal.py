"""Run imvar in a terminal of a given width."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_in_terminal(*args: str, columns: int, cwd: Path) -> tuple[int, list[str]]:
    """Run `imvar` and return its exit status, and what each line showed at any time, without escape sequences."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    env |= {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    command = [sys.executable, "-m", "imvar", *args]
    with subprocess.Popen(command, cwd=cwd, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while chunk := read(ours):
            shown += chunk
    os.close(ours)
    return process.returncode, shown.decode().replace("\r", "\n").replace("\x1b[A", "").splitlines()


def read(terminal: int) -> bytes:
    """Return what was printed next, nothing at the end."""
    try:
        return os.read(terminal, 4096)
    except OSError:  # on Linux, once nobody else has the terminal open
        return b""
