"""Checkpoints: files, tensor names, and the `from_pretrained` and `save_pretrained` of components.

What only single files, pickles or saving need is imported inside the functions that need it, to keep `import imvar`
fast.
"""

from .pretrained import load

__all__ = ["load"]
