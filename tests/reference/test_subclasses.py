"""Subclasses beside the same subclasses of diffusers' pipeline."""

import diffusers
import pytest
import torch

import imvar

LIBRARIES = diffusers, imvar


def embedding_pipeline(library):
    class Embeddings(library.StableDiffusionImageVariationPipeline):
        def _encode_image(self, image, device, num_images_per_prompt, do_classifier_free_guidance):
            context = (image if image.ndim == 3 else image[:, None]).repeat_interleave(num_images_per_prompt, 0)
            return torch.cat([torch.zeros_like(context), context]) if do_classifier_free_guidance else context

    return Embeddings


@pytest.mark.parametrize("shape", [(2, 24), (2, 1, 24), (2, 5, 24)])
@pytest.mark.parametrize("guidance_scale", [1, 3])
def test_a_subclass_is_called_with_embeddings(ref, ours, shape, guidance_scale):
    image, latents = torch.randn(shape), torch.randn(4, 4, 16, 16)
    options = {"num_inference_steps": 2, "guidance_scale": guidance_scale, "num_images_per_prompt": 2}
    options |= {"height": 128, "width": 128, "output_type": "np"}
    images = []
    for library, pipe in zip(LIBRARIES, (ref, ours), strict=True):
        parts = pipe.components | {"image_encoder": None, "safety_checker": None}
        own = embedding_pipeline(library)(**parts, requires_safety_checker=False)
        own.set_progress_bar_config(disable=True)
        images.append(own(image, latents=latents.clone(), **options).images)
    assert abs(images[0] - images[1]).max() < 1e-4
