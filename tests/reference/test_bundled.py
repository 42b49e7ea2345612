"""The checkpoint that comes with imvar, in diffusers: the same folder, the same pictures."""

import diffusers
import numpy as np
import pytest
import torch

import imvar


@pytest.fixture(scope="module")
def pipes():
    ours = imvar.StableDiffusionImageVariationPipeline.from_pretrained("imvar-emoji")
    theirs = diffusers.StableDiffusionImageVariationPipeline.from_pretrained(str(imvar.bundled_checkpoint()))
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    return ours, theirs


def test_all_parts_load_in_float32(pipes):
    for part in ("vae", "unet", "image_encoder", "safety_checker"):
        ours, theirs = (getattr(pipe, part) for pipe in pipes)
        assert {p.dtype for p in theirs.parameters() if p.is_floating_point()} == {torch.float32}, part
        published = ours.keymap.to_file(ours.state_dict())
        held = {name: tensor for name, tensor in theirs.state_dict().items() if not name.endswith("position_ids")}
        assert published.keys() == held.keys()
        assert all(torch.equal(tensor, held[name]) for name, tensor in published.items()), part
    assert type(pipes[1].scheduler) is diffusers.DDIMScheduler


def test_the_same_pictures(pipes):
    for path in list(imvar.bundled_examples().values())[:2]:
        latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        ours, theirs = (
            pipe(
                imvar.load_image(path),
                num_inference_steps=5,
                guidance_scale=3.0,
                latents=latents.clone(),
                num_images_per_prompt=2,
                output_type="np",
            )
            for pipe in pipes
        )
        assert ours.images.shape == theirs.images.shape == (2, 64, 64, 3)
        assert np.abs(ours.images - theirs.images).max() <= 1e-4
        assert ours.nsfw_content_detected == theirs.nsfw_content_detected
