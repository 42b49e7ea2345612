"""Samples during training: a grid of variations, and the teacher's accuracy on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imvar import AutoencoderKL, CLIPVisionModelWithProjection
from train_emoji.diffusion import errors
from train_emoji.drawings import Drawings
from train_emoji.encoder import pixels
from train_emoji.folder import pipeline
from train_emoji.grids import save_grid
from train_emoji.networks import Classifier, top

N_DRAWINGS = 32  # trained ones, and held-out ones
GUIDANCE, STEPS = 3.0, 20


def generate(
    pipe: Any, images: Tensor, seeds: list[int], *, steps: int = STEPS, guidance: float = GUIDANCE, batch: int = 32
) -> Tensor:
    """Generate one variation of each image (n, 3, 64, 64) in [0, 1], each with its own seed."""
    outputs = []
    for rgb, batch_seeds in zip(images.split(batch), torch.tensor(seeds).split(batch), strict=True):
        generators = [torch.Generator().manual_seed(int(seed)) for seed in batch_seeds]
        output = pipe(
            pixels(rgb), num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="pt"
        )
        outputs.append(output.images.cpu().float())
    return torch.cat(outputs)


def evaluate(
    folder: Path,
    trained: Drawings,
    held_out: Drawings,
    vae: AutoencoderKL,
    image_encoder: CLIPVisionModelWithProjection,
    teacher: Classifier,
    classes: list[str],
    prediction: str,
) -> Callable[[nn.Module], dict[str, float]]:
    """Return a function that evaluates a UNet on some trained and held-out drawings, classified by the teacher."""
    sets = {
        name: drawings.where(
            np.isin(np.arange(len(drawings)), np.linspace(0, len(drawings) - 1, N_DRAWINGS).astype(int))
        )
        for name, drawings in (("trained", trained), ("held-out", held_out))
    }

    def run(unet: nn.Module) -> dict[str, float]:
        pipe: Any = pipeline(vae, image_encoder, unet, None, prediction)  # type: ignore[arg-type]
        pipe.set_progress_bar_config(disable=True)
        figures, rows = {}, []
        for name, drawings in sets.items():
            rgb = drawings.rgb()
            output = generate(pipe, rgb.to(pipe.device), list(range(len(drawings))))
            scores = teacher(output.to(pipe.device), classes).cpu()
            labels = torch.tensor([classes.index(code) for code in drawings.codes])
            figures |= {f"{name} top-1": top(scores, labels, 1), f"{name} top-5": top(scores, labels, 5)}
            rows.append(torch.stack([rgb, output], dim=1).flatten(0, 1))
            if name == "trained":
                rgb = rgb.to(pipe.device)
                latents, embeddings = vae.encode(rgb * 2 - 1).latent_dist.mean, image_encoder(pixels(rgb)).image_embeds
                figures |= errors(unet, latents, embeddings, prediction)
        save_grid(folder / "unet.png", torch.cat(rows), columns=16)
        return figures

    return run
