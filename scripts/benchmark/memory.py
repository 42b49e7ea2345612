"""The most memory that a call needs beyond what was there before it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of(run: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """The answer of `run`, and its peak in bytes: of PyTorch's allocator on CUDA, of the process elsewhere on Linux.

    The second call counts, so that weights that are first read from their file count for nobody.
    """
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        answer = run()
        torch.cuda.synchronize()
        return answer, torch.cuda.max_memory_allocated() - before
    if not CLEAR.exists():
        return run(), 0
    hand_back()
    CLEAR.write_text("5")  # the high-water mark down to what is there now
    before = status("VmRSS")
    answer = run()
    return answer, status("VmHWM") - before


def private_of(run: Callable[[], Any]) -> tuple[None, int]:
    """How much private memory what `run` makes takes, in bytes, beside files that are mapped; on Linux."""
    run()
    if not CLEAR.exists():
        return None, 0
    hand_back()
    before = status("RssAnon")
    made = run()
    taken = status("RssAnon") - before
    del made
    return None, taken


def hand_back() -> None:
    """What is freed, to the system, which glibc does not always do by itself."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
