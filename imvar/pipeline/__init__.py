"""The pipeline: its job, and what it is beside its job."""

from .variation import StableDiffusionImageVariationPipeline

__all__ = ["StableDiffusionImageVariationPipeline"]
