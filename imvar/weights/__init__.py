"""Checkpoints: files, names, the parts' `from_pretrained` and `save_pretrained`, and conversion.

What only conversion, single files, pickles or saving need is imported by the functions that need it: together that is
a sixth of what `import imvar` would take.
"""

from typing import TYPE_CHECKING, Any

from .loading import load

if TYPE_CHECKING:
    from ..conversion.convert import convert

__all__ = ["convert", "load"]


def __getattr__(name: str) -> Any:
    """`convert`, with what only conversion needs, is imported when somebody asks for it."""
    if name == "convert":
        from ..conversion.convert import convert

        return convert
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
