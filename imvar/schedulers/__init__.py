"""The samplers: one per file, the paper's formulas on top and the scheduler class below."""

from .ddim import DDIMScheduler
from .lms import LMSDiscreteScheduler
from .pndm import PNDMScheduler

__all__ = ["DDIMScheduler", "LMSDiscreteScheduler", "PNDMScheduler"]
