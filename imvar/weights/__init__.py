"""Checkpoints: files, names, the parts' `from_pretrained` and `save_pretrained`, and conversion."""

from typing import Any

from .loading import load


def convert(*args: Any, **options: Any) -> Any:
    """`imvar.weights.conversion.convert`, which is imported when it is called for the first time."""
    from .conversion import convert

    return convert(*args, **options)


__all__ = ["convert", "load"]
