"""Out-of-memory errors that name what needs less memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import ImvarError, OutOfMemoryError, first_line, invalid

CALL_HINT = (
    "use fewer images at once (num_images_per_prompt, the list `image`), a smaller height and width, torch.float16 "
    "on a GPU, or enable_vae_tiling(), enable_attention_slicing() or enable_model_cpu_offload()"
)


@contextmanager
def explain_out_of_memory(hint: str = CALL_HINT) -> Iterator[None]:
    """Turn any out-of-memory error inside the block into an `OutOfMemoryError` with `hint`."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, ImvarError) or not is_out_of_memory(error):
            raise
        got = first_line(error) or type(error).__name__
        raise invalid(OutOfMemoryError, "out of memory", "enough memory for this call", got, hint) from error


def is_out_of_memory(error: Exception) -> bool:
    """Return whether a device or the host ran out of memory; for the host PyTorch has no exception class."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
    )
