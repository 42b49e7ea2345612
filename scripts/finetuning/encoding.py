"""The frozen models: from images to latents and embeddings."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch

from finetuning.examples import Example


@dataclass
class Encoder:
    """The VAE and the image encoder of a pipeline."""

    pipe: Any

    @torch.no_grad()
    def encode(self, example: Example) -> Example:
        """Return a batch with `mean` and `std` of the latents (b, c, h, w), unscaled, and `embedding` (b, d)."""
        vae, image_encoder = self.pipe.vae, self.pipe.image_encoder
        posterior = vae.encode(example["pixels"].to(vae.device, vae.dtype)).latent_dist
        pixel_values = example["pixel_values"].to(image_encoder.device, image_encoder.dtype)
        return {
            "mean": posterior.mean.float(),
            "std": posterior.std.float(),
            "embedding": image_encoder(pixel_values).image_embeds.float(),
        }

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes that the outputs were computed in, which therefore hold them exactly."""
        vae, image_encoder = self.pipe.vae.dtype, self.pipe.image_encoder.dtype
        return {"mean": vae, "std": vae, "embedding": image_encoder}

    @cached_property
    def digest(self) -> str:
        """The SHA-256 digest of both models' configs and weights, and of the config of the feature extractor."""
        digest = hashlib.sha256(settings_of(self.pipe.feature_extractor))
        for model in (self.pipe.vae, self.pipe.image_encoder):
            digest.update(settings_of(model))
            for name, tensor in model.state_dict().items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def settings_of(component: Any) -> bytes:
    """Return a text of the config fields of a component, without others that its file may have."""
    config = component.config
    return repr([(field.name, getattr(config, field.name)) for field in fields(config)]).encode()
