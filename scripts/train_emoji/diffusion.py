"""The UNet: denoises latents of a drawing, told the embedding of a view of it or of another vendor's drawing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imvar import AutoencoderKL, CLIPVisionModelWithProjection, DDIMScheduler, UNet2DConditionModel
from train_emoji.drawings import Drawings
from train_emoji.encoder import WIDTH, pixels
from train_emoji.loop import Job, quick_on_cpu
from train_emoji.naming import Pairs
from train_emoji.views import moved, over, premultiplied, uniform, view

SETTINGS = {
    "sample_size": 16,
    "block_out_channels": (64, 96, 128),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "cross_attention_dim": WIDTH,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
MOVED, VIEWS = 8, 16  # kept of each drawing: latents of it moved a little, and embeddings of views of it
DROPPED = 0.1  # share that is told nothing, for guidance (arXiv:2207.12598, algorithm 1)
DEVIATION = 0.3  # the most noise on an embedding, whose elements are about 1
HIGH, HIGH_SHARE = 700, 0.25  # a share of all timesteps is drawn from above this one, where layout is decided


@dataclass(frozen=True)
class Bank:
    """Latents (n, MOVED, 2, 4, 16, 16), as mean and deviation, and embeddings (n, VIEWS, 128) of n drawings."""

    latents: Tensor
    embeddings: Tensor


@torch.no_grad()
def bank(
    drawings: Drawings, vae: AutoencoderKL, encoder: CLIPVisionModelWithProjection, seed: int, device: torch.device
) -> Bank:
    """The first view's latents are of the drawing as it is, the others' of it moved a little."""
    generator = torch.Generator(device).manual_seed(seed)
    latents, embeddings = [], []
    vae, encoder = vae.to(device), encoder.to(device)
    for rgba in drawings.images.to(device).split(64):
        plain = premultiplied(rgba)
        shown = [plain, *(moved(plain, generator, turn=6, scale=(0.88, 1.02), shift=0.04) for _ in range(MOVED - 1))]
        posteriors = [vae.encode(over(one) * 2 - 1).latent_dist for one in shown]
        latents.append(torch.stack([torch.stack([one.mean, one.std], dim=1) for one in posteriors], dim=1))
        seen = [encoder(pixels(view(rgba, generator, strong=i >= VIEWS // 2))).image_embeds for i in range(VIEWS)]
        embeddings.append(torch.stack(seen, dim=1))
    return Bank(torch.cat(latents), torch.cat(embeddings))


def job(
    drawings: Drawings,
    known: Bank,
    device: torch.device,
    *,
    prediction: str = "v_prediction",
    batch: int = 32,
    rate: float = 1e-3,
    look: Callable[[nn.Module], dict[str, float]] | None = None,
) -> Job:
    model = UNet2DConditionModel(**SETTINGS)
    quick_on_cpu(model, device)
    schedule = DDIMScheduler(**SCHEDULER, prediction_type=prediction)
    concepts = sorted(set(drawings.codes.tolist()))
    pairs = Pairs(drawings, concepts, concepts, 1.0, device)

    def pick(values: Tensor, which: Tensor, generator: torch.Generator) -> Tensor:
        return values[which, torch.randint(values.shape[1], (batch,), generator=generator, device=device)]

    def loss(generator: torch.Generator) -> Tensor:
        _, first, second = pairs.draw(batch, generator)
        mean, deviation = pick(known.latents, first, generator).unbind(1)
        latents = mean + deviation * torch.randn(mean.shape, generator=generator, device=device)
        between = uniform(batch, (-1, 2), generator).clamp(0, 1)[:, None]  # a third its own, a third another vendor's
        embedding = pick(known.embeddings, first, generator).lerp(pick(known.embeddings, second, generator), between)
        strength = uniform(batch, (0, DEVIATION), generator)[:, None]
        embedding = embedding + strength * torch.randn(embedding.shape, generator=generator, device=device)
        embedding = torch.where(uniform(batch, (0, 1), generator)[:, None] < DROPPED, 0.0, embedding)

        low = torch.where(uniform(batch, (0, 1), generator) < HIGH_SHARE, HIGH, 0)
        times = (low + uniform(batch, (0, 1), generator) * (1000 - low)).long()
        noise = torch.randn(latents.shape, generator=generator, device=device)
        noisy = schedule.add_noise(latents, noise, times)
        target = noise if prediction == "epsilon" else schedule.get_velocity(latents, noise, times)
        answer = model(noisy, times, embedding[:, None], return_dict=False)[0]
        return F.mse_loss(answer.float(), target)

    return Job("unet", model, loss, batch, rate, decay=0.01, look=look, look_every=1200, compiled=(model,))


@torch.no_grad()
def errors(unet: nn.Module, latents: Tensor, embeddings: Tensor, prediction: str, seed: int = 0) -> dict[str, float]:
    """The mean squared error of the clean latents that the UNet tells from noisy ones, at some times.

    In these, predictions of epsilon and of v can be compared; latents have variance 1.
    """
    schedule = DDIMScheduler(**SCHEDULER, prediction_type=prediction)
    generator = torch.Generator(latents.device).manual_seed(seed)
    found = {}
    for time in (999, 900, 700, 300):
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        noisy = schedule.add_noise(latents, noise, torch.full((len(latents),), time, device=latents.device))
        clean, _ = parts(schedule, unet(noisy, time, embeddings[:, None], return_dict=False)[0].float(), noisy, time)
        found[f"error at {time}"] = float(((clean - latents) ** 2).mean())
    return found


def parts(scheduler: DDIMScheduler, answer: Tensor, x: Tensor, time: int) -> tuple[Tensor, Tensor]:
    """The clean latents and the noise that an answer of the UNet stands for."""
    alpha = scheduler.alphas_cumprod[time]
    if scheduler.config.prediction_type == "epsilon":
        return (x - (1 - alpha).sqrt() * answer) / alpha.sqrt(), answer
    return alpha.sqrt() * x - (1 - alpha).sqrt() * answer, alpha.sqrt() * answer + (1 - alpha).sqrt() * x
