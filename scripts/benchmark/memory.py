"""Memory of a call: its peak above the baseline, or private memory, at its peak or of the result."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


SAMPLE_INTERVAL = 0.01  # seconds


class PeakOfPrivateMemory:
    """`peak`: the most private memory of the process in the `with` block, in bytes, by samples (Linux)."""

    def __enter__(self) -> PeakOfPrivateMemory:
        self.peak, self.ended = status("RssAnon"), threading.Event()
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()
        return self

    def sample(self) -> None:
        while not self.ended.wait(SAMPLE_INTERVAL):
            self.peak = max(self.peak, status("RssAnon"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self.thread.join()
        self.peak = max(self.peak, status("RssAnon"))


def peak_memory(run: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """Return the output of `run` and its peak in bytes: of PyTorch's allocator on CUDA, else of the process (Linux).

    The second call is measured, because the first one also reads memory-mapped weights, or compiles. On CUDA it is the
    memory reserved, the pools of CUDA graphs included, above that before the first call.
    """
    if device.type == "cuda":
        x = torch.ones(16, 16, device=device)
        F.linear(x, x, x[0])  # cuBLAS allocates its workspace once, which would count for the first library alone
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        run()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        output = run()
        torch.cuda.synchronize()
        return output, torch.cuda.max_memory_reserved() - before
    run()
    if not CLEAR.exists():
        return run(), 0
    trim_heap()
    CLEAR.write_text("5")  # reset the high-water mark
    before = status("VmRSS")
    output = run()
    return output, status("VmHWM") - before


def private_memory(run: Callable[[], Any]) -> tuple[None, int]:
    """Return the private memory of what `run` returns, in bytes, without memory-mapped files (Linux)."""
    run()
    if not CLEAR.exists():
        return None, 0
    trim_heap()
    before = status("RssAnon")
    out = run()
    size = status("RssAnon") - before
    del out
    return None, size


def trim_heap() -> None:
    """Return freed memory to the system, which glibc does not always do by itself."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
