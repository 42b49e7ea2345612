"""What the approximate ways to be quicker cost in quality, and what they save: measured on imvar-emoji.

    python scripts/evaluate_approximations.py [-n 300] [--out out/approximations]

Variations of held-out drawings, the same seeds each way, which a judge that was trained apart names; and how far
they are from those that are made exactly. Prints a Markdown table, and saves a grid to look at of each way. The seconds
are those of this small model: where half of a step is left out of a large one, more of the whole is saved.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from train_emoji import judging
from train_emoji.autoencoder import psnr
from train_emoji.catalogue import REDUCED, codes
from train_emoji.measures import identity, variations
from train_emoji.pictures import save_grid

from imvar import StableDiffusionImageVariationPipeline

ASSETS = Path(__file__).resolve().parents[1] / "tests" / "emoji"
HEADER = ("what", "top-1", "top-5", "beside the exact, PSNR", "seconds a picture")


class Told:
    """A pipeline that is told more in every call."""

    def __init__(self, pipe: Any, **more: Any):
        self.pipe, self.more = pipe, more

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.pipe(*args, **options, **self.more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)


def in_eight_bits(pipe: Any) -> Any:
    pipe.enable_fp8()
    return pipe


def in_tiles(pipe: Any) -> Any:
    pipe.enable_vae_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 32, 32 // pipe.vae_scale_factor
    return pipe


WAYS: dict[str, Callable[[Any], Any]] = {
    "exact": lambda pipe: pipe,
    "`guidance_interval=(0, 0.8)`": lambda pipe: Told(pipe, guidance_interval=(0, 0.8)),
    "`guidance_interval=(0, 0.5)`": lambda pipe: Told(pipe, guidance_interval=(0, 0.5)),
    "`guidance_interval=(0.2, 0.8)`": lambda pipe: Told(pipe, guidance_interval=(0.2, 0.8)),
    "`cache_interval=2`": lambda pipe: Told(pipe, cache_interval=2),
    "`cache_interval=3`": lambda pipe: Told(pipe, cache_interval=3),
    "`cache_interval=5`": lambda pipe: Told(pipe, cache_interval=5),
    "`enable_fp8()`": in_eight_bits,
    "`enable_vae_tiling()`, tiles of half a picture's side": in_tiles,
}


def held_out() -> tuple[torch.Tensor, list[str]]:
    labels = [drawing["code"] for drawing in json.loads((ASSETS / "held-out.json").read_text(encoding="utf-8"))]
    sheet = torch.from_numpy(np.array(Image.open(ASSETS / "held-out.png"))) / 255
    return rearrange(sheet, "(y h) (x w) c -> (y x) c h w", h=64, w=64)[: len(labels)], labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=300, help="variations made each way (default: 300)")
    parser.add_argument("--out", type=Path, default=Path("out/approximations"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    judge, (pictures, labels) = judging.read(ASSETS / "judge.safetensors"), held_out()
    exact = torch.empty(0)
    for row in HEADER, ("---",) * len(HEADER):
        print(f"| {' | '.join(row)} |")
    for k, (name, change) in enumerate(WAYS.items()):
        pipe: Any = StableDiffusionImageVariationPipeline.from_pretrained(
            "imvar-emoji", safety_checker=None, requires_safety_checker=False
        )
        pipe.set_progress_bar_config(disable=True)
        told, begun = change(pipe), time.perf_counter()
        made, of, places = variations(told, pictures, labels, args.n)
        seconds = (time.perf_counter() - begun) / args.n
        found = identity(judge, made, of, codes(REDUCED.concepts))
        exact = exact if len(exact) else made
        near = "" if exact is made else f"{float(psnr(made, exact).mean()):.1f} dB"
        print(f"| {name} | {found.top1} | {found.top5} | {near} | {seconds:.3f} |", flush=True)
        save_grid(args.out / f"{k}.png", torch.stack([pictures[places], exact, made], 1).flatten(0, 1)[:192], 12)


if __name__ == "__main__":
    main()
