"""What the UNet makes, along the way: a grid to look at, and how much of it is recognised."""

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
from train_emoji.networks import Namer, top
from train_emoji.pictures import save_grid

SHOWN = 32  # drawings of either kind
GUIDANCE, STEPS = 3.0, 20


def make(
    pipe: Any, pictures: Tensor, seeds: list[int], *, steps: int = STEPS, guidance: float = GUIDANCE, batch: int = 32
) -> Tensor:
    """One variation of each picture (n, 3, 64, 64) in [0, 1], by its own seed, before the safety checker looks."""
    made = []
    for part, some in zip(pictures.split(batch), torch.tensor(seeds).split(batch), strict=True):
        noise = [torch.Generator().manual_seed(int(seed)) for seed in some]
        made.append(
            pipe(pixels(part), num_inference_steps=steps, guidance_scale=guidance, generator=noise, output_type="pt")
            .images.cpu()
            .float()
        )
    return torch.cat(made)


def look(
    folder: Path,
    trained: Drawings,
    held_out: Drawings,
    vae: AutoencoderKL,
    image_encoder: CLIPVisionModelWithProjection,
    teacher: Namer,
    among: list[str],
    prediction: str,
) -> Callable[[nn.Module], dict[str, float]]:
    """Variations of some trained and some held-out drawings, named by the teacher: no fair judge, but at hand."""
    sets = {
        name: some.where(np.isin(np.arange(len(some)), np.linspace(0, len(some) - 1, SHOWN).astype(int)))
        for name, some in (("trained", trained), ("held-out", held_out))
    }

    def run(unet: nn.Module) -> dict[str, float]:
        pipe: Any = pipeline(vae, image_encoder, unet, None, prediction)  # type: ignore[arg-type]
        pipe.set_progress_bar_config(disable=True)
        figures, rows = {}, []
        for name, some in sets.items():
            pictures = some.rgb()
            made = make(pipe, pictures.to(pipe.device), list(range(len(some))))
            scores = teacher(made.to(pipe.device), among).cpu()
            right = torch.tensor([among.index(code) for code in some.codes])
            figures |= {f"{name} top-1": top(scores, right, 1), f"{name} top-5": top(scores, right, 5)}
            rows.append(torch.stack([pictures, made], dim=1).flatten(0, 1))
            if name == "trained":
                rgb = pictures.to(pipe.device)
                latents, told = vae.encode(rgb * 2 - 1).latent_dist.mean, image_encoder(pixels(rgb)).image_embeds
                figures |= errors(unet, latents, told, prediction)
        save_grid(folder / "unet.png", torch.cat(rows), columns=16)
        return figures

    return run
