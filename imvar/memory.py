"""Memory that is freed and wanted again at once."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library keep large blocks that are freed, and give them to the next who asks.

    It hands them back to the system otherwise, which clears each anew, page by page: of a picture of 512 x 512 decoded
    on a CPU that can be a sixth of the time. In return the process stays as large as it ever was. As this holds for
    the whole process it is for its owner to call, once, before the work; `imvar vary` does.

    Returns:
        Whether there was glibc to be told, as on most of Linux; nothing happens elsewhere.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_INT) and mallopt(M_TRIM_THRESHOLD, LARGEST_INT))
