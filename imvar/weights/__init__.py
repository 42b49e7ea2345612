"""Checkpoints: files, names, the parts' `from_pretrained` and `save_pretrained`, and conversion."""

from .convert import convert
from .loading import load

__all__ = ["convert", "load"]
