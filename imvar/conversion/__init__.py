"""Conversion of checkpoints between layouts, dialects and dtypes.

`convert` is the function; its module is named otherwise, as the function would hide it.
"""

from .. import image as image  # these three register the class of every part
from .. import models as models
from .. import schedulers as schedulers
from .convert_checkpoint import convert

__all__ = ["convert"]
