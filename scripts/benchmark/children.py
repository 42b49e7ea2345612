"""Functions that run in a process of their own, without the memory and the compiled code of other measurements."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Returned = TypeVar("Returned")


def in_child(function: Callable[..., Returned], *args: object) -> Returned:
    """Return `function(*args)`, called in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
