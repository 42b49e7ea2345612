"""Image variations with Stable Diffusion, in pure PyTorch.

The public names and the modules below are imported on first use (PEP 562): `import imvar` alone loads no library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import fork_safety as fork_safety  # registers what a forked child does first
from .version import VERSION

if TYPE_CHECKING:
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
    from .pipeline import Region, StableDiffusionImageVariationPipeline
    from .pipeline.output import StableDiffusionPipelineOutput
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

__version__ = VERSION

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

HOMES = {
    "embeddings": ["augment", "load_image_embeds", "mix", "save_image_embeds", "slerp"],
    "errors": ["CheckpointError", "FlaggedError", "ImvarError", "InputError", "InputTypeError", "OutOfMemoryError"],
    "image": ["CLIPImageProcessor", "VaeImageProcessor", "make_image_grid"],
    "image.load_image": ["load_image"],
    "malloc": ["keep_freed_memory"],
    "models": [
        "AutoencoderKL",
        "CLIPConfig",
        "CLIPVisionConfig",
        "CLIPVisionModelWithProjection",
        "StableDiffusionSafetyChecker",
        "UNet2DConditionModel",
        "replace_layers",
        "sdpa",
        "set_attend",
        "sliced",
    ],
    "pipeline": ["Region", "StableDiffusionImageVariationPipeline"],
    "pipeline.output": ["StableDiffusionPipelineOutput"],
    "schedulers": [
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
    ],
    "weights.bundled": ["bundled_checkpoint", "bundled_examples"],
}
"""By module, the public names that it defines."""
MODULE_OF = {name: module for module, names in HOMES.items() for name in names}
SUBMODULES = (
    "atomic", "checks", "config", "embeddings", "errors", "image", "kernels", "malloc", "models", "noise", "oom",
    "outputs", "pipeline", "runtime", "schedulers", "weights",
)  # fmt: skip

if not TYPE_CHECKING:  # type checkers would take every name for defined

    def __getattr__(name: str) -> Any:
        """Return a public name or a module, imported on first use."""
        if name in SUBMODULES:
            return import_module(f".{name}", __name__)
        if name not in MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import_module(".pipeline", __name__)  # registers the class of every part, which readers look up
        value = globals()[name] = getattr(import_module(f".{MODULE_OF[name]}", __name__), name)
        return value


def __dir__() -> list[str]:
    """Return all names, imported or not."""
    return sorted({*globals(), *__all__, *SUBMODULES})
