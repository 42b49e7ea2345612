"""Pipelines with wrapped components beside diffusers' with the same."""

import torch
from accelerate import Accelerator


def test_components_prepared_by_accelerate_give_the_same_images(ref, ours):
    image, latents = torch.rand(1, 3, 32, 32), torch.randn(1, 4, 16, 16)

    def run(pipe):
        options = {"num_inference_steps": 2, "guidance_scale": 3, "output_type": "pt", "latents": latents.clone()}
        return pipe(image, height=128, width=128, **options).images

    plain = run(ours)
    for pipe in ref, ours:
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        pipe.unet, pipe.image_encoder = accelerator.prepare(pipe.unet, pipe.image_encoder)
    assert torch.allclose(run(ours), run(ref), atol=1e-4)
    assert not torch.allclose(run(ours), plain, atol=1e-3)
