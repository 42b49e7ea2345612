"""Pictures to pixels and back: what CLIP sees, and what the autoencoder reads and writes."""

from .clip import BatchFeature, CLIPImageProcessor, CLIPImageProcessorConfig
from .vae import VaeImageProcessor, VaeImageProcessorConfig, numpy_to_pil, to_uint8

__all__ = [
    "BatchFeature",
    "CLIPImageProcessor",
    "CLIPImageProcessorConfig",
    "VaeImageProcessor",
    "VaeImageProcessorConfig",
    "numpy_to_pil",
    "to_uint8",
]
