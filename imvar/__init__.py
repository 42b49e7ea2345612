"""Image variations with Stable Diffusion, in pure PyTorch."""

from . import fork_safety as fork_safety  # registers what a forked child does first
from .embeddings import augment, load_image_embeds, mix, save_image_embeds, slerp
from .errors import CheckpointError, FlaggedError, ImvarError, InputError, InputTypeError, OutOfMemoryError
from .image import CLIPImageProcessor, VaeImageProcessor, make_image_grid
from .image.load_image import load_image
from .malloc import keep_freed_memory
from .models import (
    AutoencoderKL,
    CLIPConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    StableDiffusionSafetyChecker,
    UNet2DConditionModel,
    replace_layers,
    sdpa,
    set_attend,
    sliced,
)
from .outputs import StableDiffusionPipelineOutput
from .pipeline import Region, StableDiffusionImageVariationPipeline
from .schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)
from .weights.bundled import bundled_checkpoint, bundled_examples

__version__ = "0.1.0"

__all__ = [
    "AutoencoderKL",
    "CLIPConfig",
    "CLIPImageProcessor",
    "CLIPVisionConfig",
    "CLIPVisionModelWithProjection",
    "CheckpointError",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlaggedError",
    "ImvarError",
    "InputError",
    "InputTypeError",
    "LMSDiscreteScheduler",
    "OutOfMemoryError",
    "PNDMScheduler",
    "Region",
    "StableDiffusionImageVariationPipeline",
    "StableDiffusionPipelineOutput",
    "StableDiffusionSafetyChecker",
    "UNet2DConditionModel",
    "VaeImageProcessor",
    "augment",
    "bundled_checkpoint",
    "bundled_examples",
    "keep_freed_memory",
    "load_image",
    "load_image_embeds",
    "make_image_grid",
    "mix",
    "replace_layers",
    "save_image_embeds",
    "sdpa",
    "set_attend",
    "slerp",
    "sliced",
]
