"""Fit a linear decoder of latents to a checkpoint's VAE, and measure it beside that of `pipe.preview`.

    python scripts/fit_preview.py [CHECKPOINT] [--images FOLDER] [--size 512]

Images are drawings of the tests by default, or all of a folder. One decoder is fitted on the latents of every second
image; that of `pipe.preview` on random latents, without any. R² is that of the colours of the other images, as the VAE
decodes them, averaged over the pixels of each latent. Prints both, the first decoder, and the times of a preview and of
the VAE.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from imvar import StableDiffusionImageVariationPipeline, load_image
from imvar.pipeline.preview import fit_linear_decoder, fit_to_random_latents, linear_decode, mean_colours

DRAWINGS = Path(__file__).resolve().parents[1] / "tests" / "emoji" / "held-out.png"
SIDE = 64  # pixels of a drawing


def read_images(folder: Path | None, size: int) -> Tensor:
    """Return images (b, 3, size, size) in [-1, 1]: those of a folder, or the drawings without a folder."""
    if folder is None:
        sheet = torch.from_numpy(np.array(load_image(DRAWINGS)))
        images = rearrange(sheet, "(y h) (x w) c -> (y x) c h w", h=SIDE, w=SIDE) / 127.5 - 1
        return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    images = [np.array(load_image(path).resize((size, size))) for path in sorted(folder.iterdir()) if path.is_file()]
    return torch.from_numpy(np.stack(images)).movedim(-1, 1) / 127.5 - 1


def encode(pipe: Any, images: Tensor) -> Tensor:
    """Return the modes of the latents of images, scaled as in the pipeline."""
    modes = [pipe.vae.encode(image).latent_dist.mode() for image in images.split(1)]
    return torch.cat(modes) * pipe.vae.config.scaling_factor


def r_squared(decoder: Tensor, latents: Tensor, images: Tensor) -> float:
    """Return the share of the colours' variance that a decoder explains, clamped as previews are."""
    colours = mean_colours(images, latents)
    error = linear_decode(latents, decoder).clamp(-1, 1) - colours
    return 1 - float(error.square().sum() / (colours - colours.mean((0, 2, 3), keepdim=True)).square().sum())


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Return the fastest of some runs."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="imvar-emoji")
    parser.add_argument("--images", type=Path, help="a folder of images (default: the drawings of the tests)")
    parser.add_argument("--size", type=int, help="height and width to fit at (default: that of the UNet's training)")
    args = parser.parse_args()
    pipe: Any = StableDiffusionImageVariationPipeline.from_pretrained(
        args.checkpoint, safety_checker=None, requires_safety_checker=False
    )
    images = read_images(args.images, args.size or pipe.default_size(None, None)[0])
    latents = encode(pipe, images)
    decoded = torch.cat([pipe.decode_on_cpu(one) for one in latents.split(1)])
    fitted = fit_linear_decoder(latents[::2], decoded[::2])
    fitted_to_noise = fit_to_random_latents(pipe.decode_on_cpu, latents.shape[1])
    for name, decoder in ("on images", fitted), ("on random latents, as pipe.preview is", fitted_to_noise):
        print(f"R² on held-out images, fitted {name}: {r_squared(decoder, latents[1::2], decoded[1::2]):.3f}")
    print("decoder fitted on images, one row for each channel and the offset:")
    for row in fitted.tolist():
        print("  ", *(f"{weight:7.4f}" for weight in row))
    x0 = torch.randn(1, latents.shape[1], 512 // pipe.vae_scale_factor, 512 // pipe.vae_scale_factor)
    pipe.preview(x0)
    preview, vae = seconds(lambda: pipe.preview(x0), 20), seconds(lambda: pipe.decode(x0), 2)
    print(f"512 x 512: preview {1e3 * preview:.2f} ms, VAE {1e3 * vae:.0f} ms, {vae / preview:.0f} times as long")


if __name__ == "__main__":
    main()
