"""What layers make of their weights, kept for the time of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..context import holding
from ..models.stock import is_unmodified, write_count


class PackedWeights:
    """Weights in another form, that a kernel is quicker with: made when they are first asked for, gone with the run.

    A run is many `calls` of one model by one thread. Weights that are replaced meanwhile, or changed in place where
    autograd sees it, are made anew.
    """

    def __init__(self, calls: int = 1) -> None:
        self.calls = calls
        self.made: dict[Any, tuple[Any, Tensor]] = {}

    def at_hand(self) -> AbstractContextManager[None]:
        """For what is called in here."""
        return holding(_here, self)

    def get(self, make: Callable[..., Any], weight: Tensor, *how: Any) -> Any:
        """`make(weight, *how)`, at the first call."""
        key = make, how, id(weight), write_count(weight)
        if key not in self.made:
            self.made[key] = make(weight, *how), weight  # which has to live for as long as its id is used
        return self.made[key][0]


_here: ContextVar[PackedWeights | None] = ContextVar("imvar_kept", default=None)


def active() -> PackedWeights | None:
    """The run that is going on here, if any."""
    return _here.get()


@contextmanager
def packing(model: nn.Module, calls: int = 1) -> Iterator[None]:
    """A run of `model`, unless this is part of one, somebody watches its layers, or gradients are wanted."""
    if torch.compiler.is_compiling() or active() or torch.is_grad_enabled() or not is_unmodified(model):
        yield
    else:
        with PackedWeights(calls).at_hand():
            yield
