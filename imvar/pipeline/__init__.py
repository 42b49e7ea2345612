"""The pipeline: its job, and what it is beside its job."""

from .image_variation import StableDiffusionImageVariationPipeline

__all__ = ["StableDiffusionImageVariationPipeline"]
