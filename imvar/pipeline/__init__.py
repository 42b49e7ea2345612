"""The image variation pipeline."""

from .image_variation import StableDiffusionImageVariationPipeline

__all__ = ["StableDiffusionImageVariationPipeline"]
