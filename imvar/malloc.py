"""Settings of glibc's malloc."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
MAX_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep large freed blocks in the process and reuse them for later allocations.

    By default glibc returns them to the system, which has to clear every page before the next use: when a 512 x 512
    image is decoded on a CPU that can be a sixth of the time. In exchange the process never shrinks. The setting is
    process-wide, so imvar does not make it on import: call it once, before the work, as `imvar vary` does.

    Returns:
        True if glibc's mallopt was available and succeeded; elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MAX_INT) and mallopt(M_TRIM_THRESHOLD, MAX_INT))
