"""Conversion of checkpoints between layouts, dialects and dtypes.

`convert` is the function; its module is named otherwise, as the function would hide it.
"""

from .convert_checkpoint import convert

__all__ = ["convert"]
