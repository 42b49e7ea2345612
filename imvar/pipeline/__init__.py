"""The image variation pipeline."""

from .image_variation import StableDiffusionImageVariationPipeline
from .regions import Region

__all__ = ["Region", "StableDiffusionImageVariationPipeline"]
