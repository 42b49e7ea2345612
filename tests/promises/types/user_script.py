"""Variations of the images in a folder, as a user would write it: checked by mypy and pyright, not run."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import imvar
from imvar import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionImageVariationPipeline, load_image

Tensors = dict[str, Tensor]


def watch(pipe: StableDiffusionImageVariationPipeline, step: int, timestep: Tensor, tensors: Tensors) -> Tensors:
    pipe.preview(tensors["latents"])[0].save(f"step-{step}.png")
    return {"latents": tensors["latents"].clamp(-4, 4)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    photos = [load_image(path) for path in sorted(parser.parse_args().folder.glob("*.jpg"))]

    pipe = StableDiffusionImageVariationPipeline.from_pretrained("imvar-emoji", torch_dtype=torch.float32)
    pipe = pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)

    made = pipe(photos, num_images_per_prompt=2, guidance_scale=3, seed=[1, 2, 3, 4], callback_on_step_end=watch)
    for image, seed in zip(made.images, made.seeds or [], strict=True):
        image.resize((256, 256)).save(f"variation-{seed}.png")
    print(any(made.nsfw_content_detected or []))
    imvar.make_image_grid(made.images, rows=2, cols=2).save("grid.png")

    array = pipe(photos, output_type="np").images
    Image.fromarray((array[0] * 255).astype(np.uint8)).save("array.png")
    generator = torch.Generator().manual_seed(0)
    pixels = pipe(photos[0], output_type="pt", generator=generator).images
    variations, flags = pipe(photos[0], return_dict=False)
    variations[0].save(f"{pixels.mean().item():.3f}-{flags}.png")

    embeds = imvar.mix([(pipe.encode_image(photo), 1 / len(photos)) for photo in photos])
    pipe(image_embeds=embeds, guidance_scale=lambda fraction: 3 * (1 - fraction)).images[0].save("mixed.png")
    same = StableDiffusionImageVariationPipeline(**pipe.components)
    same.scheduler = DDIMScheduler.from_config(same.scheduler.config)
    latents = same.vae.encode(pixels * 2 - 1).latent_dist.mode() * same.vae.config.scaling_factor
    print(same.unet.eval()(latents, 10, encoder_hidden_states=embeds).sample.shape)


if __name__ == "__main__":
    main()
