"""The VAE: 64 x 64 images to 16 x 16 x 4 latents of unit variance and back."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imvar import AutoencoderKL
from train_emoji.drawings import Drawings
from train_emoji.grids import save_grid
from train_emoji.loop import Job
from train_emoji.views import color_jitter, composite, premultiply_alpha, random_affine, uniform

SETTINGS = {
    "sample_size": 64,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "scaling_factor": 1.0,
}


def job(
    drawings: Drawings, others: Drawings, unseen: Drawings, folder: Path, device: torch.device, batch: int = 16
) -> Job:
    """Train on half-batches of `drawings` and `others`; evaluate on `unseen`."""
    model = AutoencoderKL(**SETTINGS)
    sets = [drawings.images.to(device), others.images.to(device)]
    held_out = unseen.rgb().to(device)

    def loss(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        rgba = torch.cat(
            [images[torch.randint(len(images), (batch // 2,), generator=generator, device=device)] for images in sets]
        )
        drawing = random_affine(premultiply_alpha(rgba), generator, turn=10, scale=(0.8, 1.1), shift=0.08)
        on_white = uniform(batch, (0, 1), generator).view(-1, 1, 1, 1) < 0.9
        colour = uniform(3 * batch, (0, 1), generator).view(batch, 3, 1, 1)
        x = color_jitter(composite(drawing, torch.where(on_white, 1.0, colour)), generator, 0.1) * 2 - 1
        latent = model.encode(x).latent_dist
        noise = torch.randn(latent.mean.shape, generator=generator, device=device)
        y = model.decode(latent.mean + latent.std * noise).sample.float()
        squared = F.mse_loss(y, x)
        divergence = 0.5 * (latent.mean**2 + latent.var - 1 - latent.logvar).float().mean()
        total = F.l1_loss(y, x) + squared + 0.5 * edges(y, x) + 1e-4 * divergence
        return total, {"mse": squared.detach(), "kl": divergence.detach()}

    def evaluate(model: nn.Module) -> dict[str, float]:
        output = torch.cat([reconstruct(model, chunk) for chunk in held_out.split(64)])
        save_grid(folder / "vae.png", torch.stack([held_out[:32], output[:32]], dim=1).flatten(0, 1), columns=16)
        return {"psnr of held-out concepts": float(psnr(output, held_out).mean())}

    return Job(
        "vae", model, loss, batch, rate=2e-3, evaluate=evaluate, average=0.998, compiled=(model.encoder, model.decoder)
    )


def edges(y: Tensor, x: Tensor) -> Tensor:
    """L1 loss between image gradients, which keeps edges sharp."""
    across, down = (y - x).diff(dim=-1), (y - x).diff(dim=-2)
    return across.abs().mean() + down.abs().mean()


def reconstruct(model: nn.Module, rgb: Tensor) -> Tensor:
    """Reconstruct RGB in [0, 1] from the posterior mean."""
    return (model.decode(model.encode(rgb * 2 - 1).latent_dist.mean).sample.float() / 2 + 0.5).clamp(0, 1)


def psnr(y: Tensor, x: Tensor) -> Tensor:
    """Return the PSNR of each image in dB, for values in [0, 1]."""
    return -10 * ((y - x) ** 2).mean((1, 2, 3)).log10()


@torch.no_grad()
def normalize(model: AutoencoderKL, rgb: Tensor) -> None:
    """Fold the mean and deviation of each latent channel into the 1 x 1 convolutions around the latents, in place.

    Afterwards latents have mean 0 and variance 1, so that the scaling factor is 1, and reconstructions are unchanged.
    """
    means = torch.cat([model.encode(chunk * 2 - 1).latent_dist.mean for chunk in rgb.split(64)])
    mean, deviation = means.mean((0, 2, 3)), means.std((0, 2, 3))
    before, after = model.quant_conv, model.post_quant_conv
    channels = len(mean)
    before.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    before.bias[:channels] = (before.bias[:channels] - mean) / deviation
    before.bias[channels:] -= 2 * deviation.log()  # log-variances
    after.bias += after.weight.flatten(1) @ mean
    after.weight *= deviation.view(1, -1, 1, 1)
