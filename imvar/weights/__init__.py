"""Checkpoints: files, names, and the parts' `from_pretrained` and `save_pretrained`."""

from .keymap import load

__all__ = ["load"]
