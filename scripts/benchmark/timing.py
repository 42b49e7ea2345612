"""Times of calls in interleaved rounds, and the difference of their outputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmark.busy import busy_process


def time_call(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call: by CUDA events on CUDA, by the wall clock elsewhere."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    start_time = time.perf_counter()
    run()
    return time.perf_counter() - start_time


def time_in_turn(
    runs: Sequence[Callable[[], Any]], rounds: int, seconds: Callable[[Callable[[], Any]], float], busy: bool = False
) -> list[list[float]]:
    """Return the times of each call, by `seconds`; one round calls each once. `busy`: beside one busy process."""
    times: list[list[float]] = [[] for _ in runs]
    with busy_process() if busy else nullcontext():
        for _ in range(rounds):
            for run, taken in zip(runs, times, strict=True):
                taken.append(seconds(run))
    return times


def spread(times: Sequence[float]) -> float:
    return (max(times) - min(times)) / median(times)


def ratio_with_range(slower: Sequence[float], faster: Sequence[float]) -> str:
    """Return the ratio of the medians, and the lowest and highest ratio of a round."""
    ratios = [a / b for a, b in zip(slower, faster, strict=True)]
    return f"{median(slower) / median(faster):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def rms_error(out: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the difference, relative to that of `expected`."""
    return float(torch.linalg.vector_norm(out.double() - expected) / torch.linalg.vector_norm(expected.double()))


def largest_difference(out: Any, expected: Any) -> float:
    """Return the largest difference relative to the largest value; NaN if the outputs are not tensors."""
    if not isinstance(out, Tensor):
        return float("nan")
    return float((out.double() - expected.double()).abs().max() / expected.double().abs().max())
