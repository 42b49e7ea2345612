"""Several ways to one answer, of which the quickest for inputs of a size is found by trying, and then compiled in."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..context import holding

Candidate = Callable[..., Tensor]

TIMING_ROUNDS, MIN_SPEEDUP = 5, 1.03  # the first way stays unless another is so much quicker
MAX_RELATIVE_ERROR = 0.05  # of the largest answer: no rounding

_winners: dict[Any, int] = {}
_trying: ContextVar[bool] = ContextVar("imvar_trying", default=False)
is_static_shape: Callable[[], bool] = (
    bool  # whether this is compiled for inputs of one size; `compiled.py` knows where it is
)


def autotuning() -> AbstractContextManager[None]:
    """In here, in this thread, ways are tried that were not tried yet for such inputs."""
    return holding(_trying, True)


def autotuned(name: str, ways: Sequence[Candidate], *inputs: Tensor) -> Tensor:
    """The answer, where `compiled.py` compiles this by the way that was found the quickest; else by the first."""
    compiling = torch.compiler.is_compiling()
    if compiling and not is_static_shape():
        return ways[0](*inputs)
    key = name, *((tuple(t.shape), t.dtype, t.device.type) for t in inputs)
    if compiling:
        return ways[winner(key)](*inputs)
    if _trying.get() and key not in _winners:
        _winners[key] = pick_fastest(ways, inputs)
    return ways[0](*inputs)


def winner(key: Any) -> int:
    """The number of the way that was found; `compiled.py` has it compiled in."""
    return _winners.get(key, 0)


def pick_fastest(ways: Sequence[Candidate], inputs: Sequence[Tensor]) -> int:
    """Which of the ways is the quickest; one that cannot take these inputs, or answers otherwise, is none."""
    expected = ways[0](*inputs)
    times = [time_candidate(way, inputs, expected) for way in ways]
    best = min(range(len(ways)), key=times.__getitem__)
    return best if times[best] * MIN_SPEEDUP < times[0] else 0


def time_candidate(way: Candidate, inputs: Sequence[Tensor], expected: Tensor) -> float:
    try:
        for _ in range(2):
            answer = way(*inputs)
            if not (answer - expected).abs().max() <= MAX_RELATIVE_ERROR * expected.abs().max():
                return float("inf")
    except (RuntimeError, NotImplementedError, TypeError):  # one that is not here, or not for such
        return float("inf")
    return median(time_once(way, inputs) for _ in range(TIMING_ROUNDS))


def time_once(way: Candidate, inputs: Sequence[Tensor]) -> float:
    wait = torch.cuda.synchronize if inputs[0].is_cuda else (lambda: None)
    wait()
    begun = time.perf_counter()
    way(*inputs)
    wait()
    return time.perf_counter() - begun
