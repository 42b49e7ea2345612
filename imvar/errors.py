"""Exceptions and warnings of imvar, and the one form of their messages: `name: expected X, got Y; hint`.

`InputError` is also a `ValueError` and `CheckpointError` also an `OSError`, a `ValueError` and a `RuntimeError`, so
existing `except` clauses keep working: diffusers and transformers raise all three while loading.
"""

import contextlib
import functools
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch

from .text import first_line as first_line
from .text import printable
from .text import short_repr as short_repr

INTERNAL = (
    *(str(Path(module).resolve().parent) for module in (__file__, torch.__file__ or "")),
    contextlib.__file__,  # whose functions run the `with` blocks of imvar
)

E = TypeVar("E", bound="ImvarError")


class ImvarError(Exception):
    """Base class of every error that imvar raises on purpose."""


class InputError(ImvarError, ValueError):
    """An argument has a value that is not supported.

    Attribute: `key`, the name of the argument or config field, if the error is about one.
    """

    def __init__(self, *args: Any, key: str | None = None):
        super().__init__(*args)
        self.key = key


class InputTypeError(InputError, TypeError):
    """An argument has a type that is not supported."""


class NoMethodError(InputTypeError, AttributeError):
    """A component lacks a method that is optional for components of its kind."""


class CheckpointError(ImvarError, OSError, ValueError, RuntimeError):
    """A checkpoint cannot be found, read, written or used.

    Attributes: `reason`, the message without file and key; `path`, the file or folder; `key`, the tensor or config
    field.
    """

    def __init__(self, reason: str, *, path: str | Path | None = None, key: str | None = None):
        self.reason, self.path, self.key = reason, None if path is None else Path(path), key
        named = key is not None and re.search(rf"(^|[ .]){re.escape(key)}: |: {re.escape(key)}", reason)
        parts = (path, None if named else key, reason)
        super().__init__(printable(": ".join(str(part) for part in parts if part is not None)))

    def at(self, path: str | Path | None) -> Self:
        """Return the same error about another file or folder."""
        return type(self)(self.reason, path=path, key=self.key)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), path=self.path, key=self.key), (self.reason,)


class OutOfMemoryError(ImvarError, torch.OutOfMemoryError):
    """The host or the accelerator ran out of memory; also a `RuntimeError`."""


class FlaggedError(ImvarError):
    """The safety checker flagged an image and the call asked for an error (`on_flagged="raise"`).

    Attributes: `flags`, one per image; `scores`, as in the pipeline output; `seeds`, of all images, or None.
    """

    def __init__(self, message: str, flags: Sequence[bool] = (), scores: Any = None, seeds: Any = None):
        super().__init__(message)
        self.flags, self.scores, self.seeds = list(flags), scores, seeds


def invalid(kind: type[E], name: Any, expected: str, got: str, hint: str = "", **details: Any) -> E:
    """Return an error of class `kind` with the message `name: expected X, got Y; hint`.

    Every `raise` in imvar goes through here. `name`: an argument or config field, which becomes the `key` of an
    `InputError`, or the file or folder of a `CheckpointError`. `got` is text: `short_repr(value)` for a value,
    `describe(value)` for a type or shape. `details` are further arguments of `kind`, such as `key`.
    """
    reason = f"expected {expected}, got {got}" + (f"; {hint}" if hint else "")
    error: Any = kind  # whose constructor depends on the class
    if issubclass(kind, CheckpointError):
        return error(reason, path=name, **details)
    if issubclass(kind, InputError):
        details.setdefault("key", str(name))
    return error(printable(f"{name}: {reason}"), **details)


def in_checkpoint(error: InputError, path: str | Path | None) -> CheckpointError:
    """Return an `InputError` about a config field as a `CheckpointError` about the file that holds the field."""
    return CheckpointError(str(error), path=path, key=error.key)


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called into imvar: the first frame outside imvar and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_code.co_filename.startswith(INTERNAL):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def describe(value: Any) -> str:
    """Return the shape of a tensor or array, or the class name of anything else."""
    noun = "a tensor" if isinstance(value, torch.Tensor) else "an array" if isinstance(value, np.ndarray) else None
    return f"{noun} of shape {tuple(value.shape)}" if noun else type(value).__name__
