"""Ways to walk from noise to a picture: one file each, the arithmetic on top, the class below."""

from .ddim import DDIMScheduler
from .lms import LMSDiscreteScheduler
from .pndm import PNDMScheduler

__all__ = ["DDIMScheduler", "LMSDiscreteScheduler", "PNDMScheduler"]
