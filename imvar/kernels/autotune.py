"""Autotuning: time several implementations of an operation for given inputs and remember the fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

Candidate = Callable[..., Tensor]

TIMING_ROUNDS = 5
MIN_SPEEDUP = 1.03  # over the first candidate, which is kept otherwise
MAX_RELATIVE_ERROR = 0.05  # of the largest output; more is not rounding

_winners: dict[Any, int] = {}


def key_of(name: str, inputs: Sequence[Tensor]) -> Any:
    """Return what a winner is remembered by: the operation, and the shape, dtype and device of every input."""
    return name, *((tuple(t.shape), t.dtype, t.device.type) for t in inputs)


def winner(key: Any) -> int:
    """Return the index of the fastest candidate, 0 before any was timed."""
    return _winners.get(key, 0)


def tune(name: str, candidates: Sequence[Candidate], inputs: Sequence[Tensor]) -> None:
    """Time the candidates for these inputs, unless that was done before."""
    key = key_of(name, inputs)
    if key not in _winners:
        _winners[key] = pick_fastest(candidates, inputs)


def pick_fastest(candidates: Sequence[Candidate], inputs: Sequence[Tensor]) -> int:
    """Return the index of the fastest candidate whose output equals the first one's up to rounding."""
    expected = candidates[0](*inputs)
    times = [time_candidate(candidate, inputs, expected) for candidate in candidates]
    best = min(range(len(candidates)), key=times.__getitem__)
    return best if times[best] * MIN_SPEEDUP < times[0] else 0


def time_candidate(candidate: Candidate, inputs: Sequence[Tensor], expected: Tensor) -> float:
    """Return the median time in seconds; infinity if the candidate fails on these inputs or its output differs."""
    try:
        for _ in range(2):
            out = candidate(*inputs)
            if not (out - expected).abs().max() <= MAX_RELATIVE_ERROR * expected.abs().max():
                return float("inf")
    except (RuntimeError, NotImplementedError, TypeError):  # not available, or not for such inputs
        return float("inf")
    return median(time_once(candidate, inputs) for _ in range(TIMING_ROUNDS))


def time_once(candidate: Candidate, inputs: Sequence[Tensor]) -> float:
    """Return the time of one call in seconds, the device's work included."""
    synchronize = torch.cuda.synchronize if inputs[0].is_cuda else (lambda: None)
    synchronize()
    start = time.perf_counter()
    candidate(*inputs)
    synchronize()
    return time.perf_counter() - start
