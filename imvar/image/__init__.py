"""Image processors: preprocessing for CLIP, pre- and postprocessing for the VAE, and reading image files."""

from .clip import BatchFeature, CLIPImageProcessor, CLIPImageProcessorConfig
from .grid import make_image_grid
from .vae import VaeImageProcessor, VaeImageProcessorConfig, numpy_to_pil, to_uint8

__all__ = [
    "BatchFeature",
    "CLIPImageProcessor",
    "CLIPImageProcessorConfig",
    "VaeImageProcessor",
    "VaeImageProcessorConfig",
    "make_image_grid",
    "numpy_to_pil",
    "to_uint8",
]
