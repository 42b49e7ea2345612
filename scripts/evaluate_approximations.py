"""Measure quality and speed of imvar's approximate accelerations on imvar-emoji.

    python scripts/evaluate_approximations.py [-n 300] [--only int8] [--out out/approximations]

Generates variations of held-out drawings with the same seeds for each option, and measures the accuracy of an
independently trained judge and the PSNR against the exact output. Prints a Markdown table and saves an image grid for
each option. Times are of this small model; a large one saves a larger share.
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
from train_emoji.grids import save_grid
from train_emoji.measures import accuracy, variations

from imvar import StableDiffusionImageVariationPipeline

ASSETS = Path(__file__).resolve().parents[1] / "tests" / "emoji"
HEADER = ("option", "top-1", "top-5", "PSNR against exact", "seconds per image")


class WithOptions:
    """A pipeline with additional arguments in every call."""

    def __init__(self, pipe: Any, **defaults: Any):
        self.pipe, self.defaults = pipe, defaults

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.pipe(*args, **options, **self.defaults)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)


def with_fp8(pipe: Any) -> Any:
    pipe.enable_fp8()
    return pipe


def with_int8(pipe: Any) -> Any:
    pipe.enable_int8()
    return pipe


def with_tiling(pipe: Any) -> Any:
    pipe.enable_vae_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 32, 32 // pipe.vae_scale_factor
    return pipe


OPTIONS: dict[str, Callable[[Any], Any]] = {
    "exact": lambda pipe: pipe,
    "`guidance_interval=(0, 0.8)`": lambda pipe: WithOptions(pipe, guidance_interval=(0, 0.8)),
    "`guidance_interval=(0, 0.5)`": lambda pipe: WithOptions(pipe, guidance_interval=(0, 0.5)),
    "`guidance_interval=(0.2, 0.8)`": lambda pipe: WithOptions(pipe, guidance_interval=(0.2, 0.8)),
    "`cache_interval=2`": lambda pipe: WithOptions(pipe, cache_interval=2),
    "`cache_interval=3`": lambda pipe: WithOptions(pipe, cache_interval=3),
    "`cache_interval=5`": lambda pipe: WithOptions(pipe, cache_interval=5),
    "`enable_fp8()`": with_fp8,
    "`enable_int8()`": with_int8,
    "`enable_vae_tiling()`, tiles of half the image's side": with_tiling,
}


def held_out() -> tuple[torch.Tensor, list[str]]:
    labels = [drawing["code"] for drawing in json.loads((ASSETS / "held-out.json").read_text(encoding="utf-8"))]
    sheet = torch.from_numpy(np.array(Image.open(ASSETS / "held-out.png"))) / 255
    return rearrange(sheet, "(y h) (x w) c -> (y x) c h w", h=64, w=64)[: len(labels)], labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=300, help="variations per option (default: 300)")
    parser.add_argument("--only", metavar="TEXT", default="", help="options with this in their name, and the exact one")
    parser.add_argument("--out", type=Path, default=Path("out/approximations"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    judge, (images, labels) = judging.read(ASSETS / "judge.safetensors"), held_out()
    exact = torch.empty(0)
    for row in HEADER, ("---",) * len(HEADER):
        print(f"| {' | '.join(row)} |")
    for k, (name, change) in enumerate(OPTIONS.items()):
        if name != "exact" and args.only not in name:
            continue
        pipe: Any = StableDiffusionImageVariationPipeline.from_pretrained(
            "imvar-emoji", safety_checker=None, requires_safety_checker=False
        )
        pipe.set_progress_bar_config(disable=True)
        configured, started = change(pipe), time.perf_counter()
        output, output_labels, indices = variations(configured, images, labels, args.n)
        seconds = (time.perf_counter() - started) / args.n
        result = accuracy(judge, output, output_labels, codes(REDUCED.concepts))
        exact = exact if len(exact) else output
        distance = "" if exact is output else f"{float(psnr(output, exact).mean()):.1f} dB"
        print(f"| {name} | {result.top1} | {result.top5} | {distance} | {seconds:.3f} |", flush=True)
        save_grid(args.out / f"{k}.png", torch.stack([images[indices], exact, output], 1).flatten(0, 1)[:192], 12)


if __name__ == "__main__":
    main()
