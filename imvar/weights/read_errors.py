"""Errors of the system while a checkpoint is read: permissions, failing disks and network file systems, memory."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from ..atomic.filesystem import ABSENT
from ..errors import CheckpointError, first_line, invalid
from ..oom import is_out_of_memory


@contextmanager
def explain_read_error(path: Path | None) -> Iterator[None]:
    """Convert an `OSError` or an out-of-memory error in the block to a `CheckpointError` with its cause.

    The error is about the file or folder that an `OSError` names, or about `path`.
    """
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else path
        got = error.strerror or first_line(error)
        raise invalid(CheckpointError, where, "a readable file or folder", got) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        got = first_line(error) or type(error).__name__
        raise invalid(CheckpointError, path, "enough memory to load it", got) from error


def kind_of(path: Path) -> Literal["file", "folder"] | None:
    """Return what is at `path`, None for nothing; raise `CheckpointError` if that is unknown, as without permission."""
    with explain_read_error(path):
        try:
            return "folder" if stat.S_ISDIR(os.stat(path).st_mode) else "file"
        except OSError as error:
            if error.errno not in ABSENT:
                raise
    return None
