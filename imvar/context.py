"""Values that hold for the time of a `with`, in the thread or task that enters it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


@contextmanager
def holding(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """`variable` is `value` in here, and what it was before from then on, however this is left."""
    before = variable.get()
    try:
        variable.set(value)
        yield
    finally:
        variable.set(before)
