"""The gallery in the README: the bundled examples, each with variations of it that imvar-emoji makes.

    python scripts/gallery.py [FILE] [-n 4] [--seed 0]

Nothing is chosen: variation k of every drawing comes of seed S + k.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from imvar import StableDiffusionImageVariationPipeline, bundled_checkpoint, bundled_examples, load_image

SIDE, GAP, COLUMNS, CAPTION = 128, 6, 2, 22
PAPER, INK, NEW = "#faf9f6", "#2b2a28", "#b4552d"


def row(pipe: Any, name: str, path: Path, seeds: range) -> Image.Image:
    """The drawing under its name, a line, and its variations."""
    picture = load_image(path)
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    made = pipe(picture, num_inference_steps=20, guidance_scale=3, num_images_per_prompt=len(seeds), generator=noise)
    image = Image.new("RGB", ((len(seeds) + 1) * (SIDE + GAP) + 3 * GAP, SIDE + CAPTION + GAP), PAPER)
    image.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    for k, variation in enumerate(made.images, start=1):
        image.paste(variation.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (k * (SIDE + GAP) + 2 * GAP, 0))
    shown = name.removesuffix("-held-out")
    words = shown.replace("-", " ") + (": held out" if name.endswith("-held-out") else "")
    ImageDraw.Draw(image).text((2, SIDE + 3), words, NEW if ":" in words else INK, ImageFont.load_default(13))
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=bundled_checkpoint() / "gallery.png")
    parser.add_argument("-n", type=int, default=4, help="variations of each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.n < 1:
        parser.error(f"-n {args.n}: 1 or more would do")
    args.file.parent.mkdir(parents=True, exist_ok=True)
    pipe: Any = StableDiffusionImageVariationPipeline.from_pretrained("imvar-emoji")
    pipe.set_progress_bar_config(disable=True)
    rows = [row(pipe, name, path, range(args.seed, args.seed + args.n)) for name, path in bundled_examples().items()]
    width, height = rows[0].width + 2 * GAP, rows[0].height + GAP
    sheet = Image.new("RGB", (COLUMNS * width + GAP, -(-len(rows) // COLUMNS) * height + GAP), PAPER)
    for i, image in enumerate(rows):
        sheet.paste(image, (i % COLUMNS * width + GAP, i // COLUMNS * height + GAP))
    sheet.save(args.file, "PNG", optimize=True)
    print(args.file)


if __name__ == "__main__":
    main()
