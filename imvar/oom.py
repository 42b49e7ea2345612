"""Memory: what is freed and wanted again at once, and what there is not enough of."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import OutOfMemoryError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LARGEST_INT = 2**31 - 1
WAYS = (
    "fewer pictures at once (num_images_per_prompt, the list `image`), a smaller height and width, torch.float16 "
    "on a GPU, or enable_vae_tiling(), enable_attention_slicing() or enable_model_cpu_offload()"
)


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


@contextmanager
def explain_out_of_memory(ways: str = WAYS) -> Iterator[None]:
    """Out of memory in here becomes an `OutOfMemoryError` that says what would need less."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"out of memory: {ways} would need less") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether there was too little memory, on a device or of the machine, for which PyTorch has no class of error."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
    )
