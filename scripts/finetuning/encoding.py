"""The frozen models: from images to latents and embeddings, for each batch or once, for a bank."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from finetuning.examples import Example
from finetuning.images import Images
from imvar.atomic.file import atomic_write


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


class Bank(Dataset):
    """The encoded images, in a file that is mapped into memory."""

    def __init__(self, path: Path):
        self.path = path
        self.tensors: dict[str, Tensor] = {}

    def load(self) -> dict[str, Tensor]:
        if not self.tensors:
            with safe_open(self.path, "pt") as file:
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return self.tensors

    def __len__(self) -> int:
        return len(self.load()["mean"])

    def __getitem__(self, index: int) -> Example:
        return {name: tensor[index] for name, tensor in self.load().items()}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "tensors": {}}  # each worker maps the file itself


def bank_path(out: Path, images: Images, model: str) -> Path:
    """Return the path of the bank of these images, encoded by this model."""
    described = repr((images.items, images.resolution, images.preprocess, model))
    return out / f"bank-{hashlib.sha256(described.encode()).hexdigest()[:12]}.safetensors"


def write_bank(path: Path, images: Images, encoder: Encoder, batch: int, workers: int) -> None:
    """Encode all images and write them as a bank."""
    parts: list[Example] = []
    for example in DataLoader(images, batch_size=batch, num_workers=workers):
        parts.append({name: tensor.cpu() for name, tensor in encoder.encode(example).items()})
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    atomic_write(path, lambda temporary: save_file(tensors, temporary))
