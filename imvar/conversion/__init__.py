"""Conversion of checkpoints between layouts, dialects and dtypes."""

from .convert_checkpoint import convert

__all__ = ["convert"]
