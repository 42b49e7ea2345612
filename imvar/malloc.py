"""Freed memory: whether glibc's malloc keeps it or returns it to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
MAX_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep large freed blocks in the process and reuse them for later allocations.

    By default glibc returns them to the system, which has to clear every page before the next use: when a 512 x 512
    image is decoded on a CPU that can be a sixth of the time. In exchange the process hardly shrinks: freed blocks are
    returned only once per call, before large images are decoded. The setting is process-wide, so imvar does not make
    it on import: call it once, before the work, as `imvar vary` does.

    Returns:
        True if glibc's mallopt was available and succeeded; elsewhere nothing happens.
    """
    mallopt = libc_function("mallopt")
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, MAX_INT) and mallopt(M_TRIM_THRESHOLD, MAX_INT))


def return_freed_memory() -> None:
    """Return freed blocks to the system, also those between others and those that `keep_freed_memory` keeps."""
    malloc_trim = libc_function("malloc_trim")
    if malloc_trim:
        malloc_trim(0)


def libc_function(name: str) -> Callable[..., int] | None:
    """Return a function of the C library; None in another one than glibc, or on another system."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
