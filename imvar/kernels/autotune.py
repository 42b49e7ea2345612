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

Way = Callable[..., Tensor]

ROUNDS, GAIN = 5, 1.03  # the first way stays unless another is so much quicker
FAR = 0.05  # of the largest answer: no rounding

_found: dict[Any, int] = {}
_trying: ContextVar[bool] = ContextVar("imvar_trying", default=False)
sized: Callable[[], bool] = bool  # whether this is compiled for inputs of one size; `compiled.py` knows where it is


def trying() -> AbstractContextManager[None]:
    """In here, in this thread, ways are tried that were not tried yet for such inputs."""
    return holding(_trying, True)


def quickest(name: str, ways: Sequence[Way], *inputs: Tensor) -> Tensor:
    """The answer, where `compiled.py` compiles this by the way that was found the quickest; else by the first."""
    compiling = torch.compiler.is_compiling()
    if compiling and not sized():
        return ways[0](*inputs)
    key = name, *((tuple(t.shape), t.dtype, t.device.type) for t in inputs)
    if compiling:
        return ways[chosen(key)](*inputs)
    if _trying.get() and key not in _found:
        _found[key] = trial(ways, inputs)
    return ways[0](*inputs)


def chosen(key: Any) -> int:
    """The number of the way that was found; `compiled.py` has it compiled in."""
    return _found.get(key, 0)


def trial(ways: Sequence[Way], inputs: Sequence[Tensor]) -> int:
    """Which of the ways is the quickest; one that cannot take these inputs, or answers otherwise, is none."""
    expected = ways[0](*inputs)
    times = [seconds(way, inputs, expected) for way in ways]
    best = min(range(len(ways)), key=times.__getitem__)
    return best if times[best] * GAIN < times[0] else 0


def seconds(way: Way, inputs: Sequence[Tensor], expected: Tensor) -> float:
    try:
        for _ in range(2):
            answer = way(*inputs)
            if not (answer - expected).abs().max() <= FAR * expected.abs().max():
                return float("inf")
    except (RuntimeError, NotImplementedError, TypeError):  # one that is not here, or not for such
        return float("inf")
    return median(timed(way, inputs) for _ in range(ROUNDS))


def timed(way: Way, inputs: Sequence[Tensor]) -> float:
    wait = torch.cuda.synchronize if inputs[0].is_cuda else (lambda: None)
    wait()
    begun = time.perf_counter()
    way(*inputs)
    wait()
    return time.perf_counter() - begun
