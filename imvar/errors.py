"""What can go wrong, by whose fault.

Every error names the argument, file or key, what came and what would do. `InputError` is also a
`ValueError` and `CheckpointError` also an `OSError`, so code that catches those goes on working.
"""

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

LONGEST = 2000  # characters of a message


class ImvarError(Exception):
    """The root of every error that imvar raises on purpose."""


class InputError(ImvarError, ValueError):
    """An argument has a value that cannot do what was asked.

    Attribute: `key`, the argument or setting, where it is one.
    """

    def __init__(self, *args: Any, key: str | None = None):
        super().__init__(*args)
        self.key = key


class InputTypeError(InputError, TypeError):
    """An argument is of a type that cannot do what was asked."""


class CheckpointError(ImvarError, OSError):
    """A checkpoint cannot be found, read, written or used.

    Attributes: `reason`, in words; `path`, the file or folder; `key`, the tensor or config field.
    """

    def __init__(self, reason: str, *, path: str | Path | None = None, key: str | None = None):
        self.reason, self.path, self.key = reason, None if path is None else Path(path), key
        told = key is not None and (reason.startswith(f"{key}:") or f"{key}=" in reason or f": {key}" in reason)
        parts = (path, None if told else key, reason)
        super().__init__(printable(": ".join(str(part) for part in parts if part is not None)))

    def __reduce__(self):
        return _checkpoint_error, (self.reason, self.path, self.key)

    def __str__(self) -> str:
        return str(self.args[0])


def printable(text: str) -> str:
    """Names out of a file must not write over the terminal that shows them, nor fill it."""
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 200]} ... {text[-200:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class OutOfMemoryError(ImvarError, torch.OutOfMemoryError):
    """There is not enough memory, of the machine or its accelerator, for what was asked; a `RuntimeError` as well."""


class FlaggedError(ImvarError):
    """The safety checker flagged a picture, and the call was asked to say so with `on_flagged="raise"`.

    Attributes: `flags`, one a picture; `scores`, as those of the output; `seeds`, of all pictures, or None.
    """

    def __init__(self, message: str, flags: Sequence[bool] = (), scores: Any = None, seeds: Any = None):
        super().__init__(message, flags, scores, seeds)
        self.flags, self.scores, self.seeds = list(flags), scores, seeds

    def __str__(self) -> str:
        return str(self.args[0])


def shown(value: Any) -> str:
    """`repr` of what came, cut to a length that a message can have."""
    return _shown.repr(value)


class Shown(reprlib.Repr):
    """Also of whole numbers that are too long for Python to write down."""

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 4096 else f"<a whole number of {x.bit_length()} bits>"


_shown = Shown()
_shown.maxstring = _shown.maxother = _shown.maxlong = 200
_shown.maxlist = _shown.maxtuple = _shown.maxdict = 10


def _checkpoint_error(reason: str, path: Path | None, key: str | None) -> CheckpointError:
    return CheckpointError(reason, path=path, key=key)


def formed(value: Any) -> str:
    """A tensor by its shape, anything else by its class."""
    return f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
