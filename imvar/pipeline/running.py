"""Calls while they run: each has its own scheduler, and any thread may interrupt it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor


class RunningCall:
    """A call of a pipeline while it runs.

    Attributes: `scheduler`, its own; `num_timesteps`, the number of its steps once it has any; `interrupted`, whether
    to end it after the current step; `ended_early`, whether that has left steps out.
    """

    def __init__(self, pipe: Any, scheduler: Any):
        self.pipe, self.scheduler = pipe, scheduler
        self.interrupted, self.ended_early, self.num_timesteps = False, False, 0

    def until_interrupted(self, timesteps: Any) -> Iterator[tuple[int, Any]]:
        """Yield the index and the timestep of each step, until one after which the call is interrupted."""
        self.num_timesteps = len(timesteps)
        for i, t in enumerate(timesteps.cpu() if isinstance(timesteps, Tensor) else timesteps):
            self.ended_early = i > 0 and self.interrupted
            if self.ended_early:
                return
            yield i, t


_in_this_thread: ContextVar[tuple[RunningCall, ...]] = ContextVar("imvar_running_calls", default=())
"""The calls that this thread or task is in, innermost last."""

_in_all_threads: set[RunningCall] = set()
"""Added to, removed from and copied in one operation each, which other threads cannot divide."""


@contextmanager
def run_call(pipe: Any, scheduler: Any) -> Iterator[RunningCall]:
    """Register a call of a pipeline within the context, with a shallow copy of its scheduler.

    A scheduler with a monkeypatched method is used without a copy: the patch may hold a reference to it.
    """
    patched = any(callable(getattr(type(scheduler), name, None)) for name in getattr(scheduler, "__dict__", ()))
    try:
        own = scheduler if patched else copy.copy(scheduler)
    except Exception:  # not every third-party scheduler can be copied, such as a proxy of another one
        own = scheduler
    call, before = RunningCall(pipe, own), _in_this_thread.get()
    try:
        _in_this_thread.set((*before, call))
        _in_all_threads.add(call)
        yield call
    finally:
        _in_all_threads.discard(call)
        _in_this_thread.set(before)


def innermost_call(pipe: Any) -> RunningCall | None:
    """Return the call of a pipeline that this thread is in."""
    return next((call for call in reversed(_in_this_thread.get()) if call.pipe is pipe), None)


def interrupt_calls(pipe: Any) -> None:
    """Interrupt the calls of a pipeline that are running now, in any thread."""
    for call in tuple(_in_all_threads):
        if call.pipe is pipe:
            call.interrupted = True
