"""Checkpoints: files, names, and the parts' `from_pretrained` and `save_pretrained`."""

from .pretrained import load

__all__ = ["load"]
