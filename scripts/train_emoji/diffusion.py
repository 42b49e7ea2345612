"""The UNet: denoises latents of a drawing, conditioned on the embedding of it or of another vendor's drawing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imvar import AutoencoderKL, CLIPVisionModelWithProjection, DDIMScheduler, UNet2DConditionModel
from train_emoji.classifiers import Pairs
from train_emoji.drawings import Drawings
from train_emoji.encoder import WIDTH, pixels
from train_emoji.loop import Job, use_unfused_attention_on_cpu
from train_emoji.views import composite, premultiply_alpha, random_affine, uniform, view

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
N_LATENTS, N_VIEWS = 8, 16  # per drawing: latents under small affine transforms, and embeddings of views
DROPPED = 0.1  # share without conditioning, for classifier-free guidance (arXiv:2207.12598, algorithm 1)
DEVIATION = 0.3  # maximal noise on an embedding, whose elements are about 1
HIGH, HIGH_SHARE = 700, 0.25  # this share of timesteps is drawn from above this one, where the layout is determined


@dataclass(frozen=True)
class Bank:
    """Latents (n, N_LATENTS, 2, 4, 16, 16), as mean and deviation, and embeddings (n, N_VIEWS, 128) of n drawings."""

    latents: Tensor
    embeddings: Tensor


@torch.no_grad()
def bank(
    drawings: Drawings, vae: AutoencoderKL, encoder: CLIPVisionModelWithProjection, seed: int, device: torch.device
) -> Bank:
    """Compute the bank. The first latents of a drawing are untransformed, the others have a small affine transform."""
    generator = torch.Generator(device).manual_seed(seed)
    latents, embeddings = [], []
    vae, encoder = vae.to(device), encoder.to(device)
    for rgba in drawings.images.to(device).split(64):
        image = premultiply_alpha(rgba)
        images = [
            image,
            *(random_affine(image, generator, turn=6, scale=(0.88, 1.02), shift=0.04) for _ in range(N_LATENTS - 1)),
        ]
        posteriors = [vae.encode(composite(i) * 2 - 1).latent_dist for i in images]
        latents.append(torch.stack([torch.stack([p.mean, p.std], dim=1) for p in posteriors], dim=1))
        views = [encoder(pixels(view(rgba, generator, strong=i >= N_VIEWS // 2))).image_embeds for i in range(N_VIEWS)]
        embeddings.append(torch.stack(views, dim=1))
    return Bank(torch.cat(latents), torch.cat(embeddings))


def job(
    drawings: Drawings,
    targets: Bank,
    device: torch.device,
    *,
    prediction: str = "v_prediction",
    batch: int = 32,
    rate: float = 1e-3,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
) -> Job:
    model = UNet2DConditionModel(**SETTINGS)
    use_unfused_attention_on_cpu(model, device)
    schedule = DDIMScheduler(**SCHEDULER, prediction_type=prediction)
    concepts = sorted(set(drawings.codes.tolist()))
    pairs = Pairs(drawings, concepts, concepts, 1.0, device)

    def pick(values: Tensor, which: Tensor, generator: torch.Generator) -> Tensor:
        return values[which, torch.randint(values.shape[1], (batch,), generator=generator, device=device)]

    def loss(generator: torch.Generator) -> Tensor:
        _, first, second = pairs.draw(batch, generator)
        mean, deviation = pick(targets.latents, first, generator).unbind(1)
        latents = mean + deviation * torch.randn(mean.shape, generator=generator, device=device)
        between = uniform(batch, (-1, 2), generator).clamp(0, 1)[:, None]  # a third its own, a third the other vendor's
        embedding = pick(targets.embeddings, first, generator).lerp(
            pick(targets.embeddings, second, generator), between
        )
        strength = uniform(batch, (0, DEVIATION), generator)[:, None]
        embedding = embedding + strength * torch.randn(embedding.shape, generator=generator, device=device)
        embedding = torch.where(uniform(batch, (0, 1), generator)[:, None] < DROPPED, 0.0, embedding)

        low = torch.where(uniform(batch, (0, 1), generator) < HIGH_SHARE, HIGH, 0)
        timesteps = (low + uniform(batch, (0, 1), generator) * (1000 - low)).long()
        noise = torch.randn(latents.shape, generator=generator, device=device)
        noisy = schedule.add_noise(latents, noise, timesteps)
        target = noise if prediction == "epsilon" else schedule.get_velocity(latents, noise, timesteps)
        output = model(noisy, timesteps, embedding[:, None], return_dict=False)[0]
        return F.mse_loss(output.float(), target)

    return Job("unet", model, loss, batch, rate, decay=0.01, evaluate=evaluate, evaluate_every=1200, compiled=(model,))


@torch.no_grad()
def errors(unet: nn.Module, latents: Tensor, embeddings: Tensor, prediction: str, seed: int = 0) -> dict[str, float]:
    """Return the mean squared error of the predicted x_0 at some timesteps.

    It is comparable between epsilon and v prediction; latents have variance 1.
    """
    schedule = DDIMScheduler(**SCHEDULER, prediction_type=prediction)
    generator = torch.Generator(latents.device).manual_seed(seed)
    result = {}
    for time in (999, 900, 700, 300):
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        noisy = schedule.add_noise(latents, noise, torch.full((len(latents),), time, device=latents.device))
        clean, _ = to_x0_and_eps(
            schedule, unet(noisy, time, embeddings[:, None], return_dict=False)[0].float(), noisy, time
        )
        result[f"error at {time}"] = float(((clean - latents) ** 2).mean())
    return result


def to_x0_and_eps(scheduler: DDIMScheduler, output: Tensor, x: Tensor, time: int) -> tuple[Tensor, Tensor]:
    """Convert a UNet output to the predicted x_0 and noise."""
    alpha = scheduler.alphas_cumprod[time]
    if scheduler.config.prediction_type == "epsilon":
        return (x - (1 - alpha).sqrt() * output) / alpha.sqrt(), output
    return alpha.sqrt() * x - (1 - alpha).sqrt() * output, alpha.sqrt() * output + (1 - alpha).sqrt() * x
