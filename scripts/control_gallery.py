"""Render the images of docs/control.md with imvar-emoji: its bundled drawings, varied in each of the ways there.

    python scripts/control_gallery.py [NAME ...] [--out docs/images]

Not cherry-picked: the images of a row have the seeds 0, 1, 2 ...
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import imvar
from imvar import Region, bundled_examples, load_image, make_image_grid, slerp
from imvar.contact_sheet import SheetRow, contact_sheet

STEPS, GUIDANCE, SIZE, SEEDS = 20, 3.0, 64, range(4)
SHAPE = {"down_blocks.1": 1, "mid_block": 1, "up_blocks.1": 1}  # the blocks of low resolution
LOOK = {"down_blocks.0": 1, "up_blocks.2": 1}  # those of high resolution


class Gallery:
    """The pipeline, and the bundled drawings with their embeddings."""

    def __init__(self) -> None:
        self.pipe: Any = imvar.StableDiffusionImageVariationPipeline.from_pretrained("imvar-emoji")
        self.pipe.set_progress_bar_config(disable=True)
        examples = bundled_examples().items()
        self.drawings = {name.split("-")[0]: load_image(path) for name, path in examples}  # "fox", "panda" ...

    def embed(self, name: str) -> torch.Tensor:
        return self.pipe.encode_image(self.drawings[name])

    def variations(self, **options: Any) -> list[tuple[str, Image.Image]]:
        """Return a captioned image for each seed."""
        seeds = [*SEEDS]
        defaults = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "num_images_per_prompt": len(seeds)}
        images = self.pipe(**(defaults | options), seed=seeds).images
        return [(f"seed {seed}", image) for seed, image in zip(seeds, images, strict=True)]

    def pair(self, *names: str) -> Image.Image:
        """Return drawings side by side."""
        return make_image_grid([self.drawings[name].resize((128, 128)) for name in names], rows=1, cols=len(names))


def regions(gallery: Gallery) -> list[SheetRow]:
    """One embedding in the left half, another in the right half."""
    left = torch.zeros(SIZE, SIZE)
    left[:, : SIZE // 2] = 1
    rows = []
    for a, b in ("fox", "panda"), ("cake", "strawberry"):
        embeds = [Region(gallery.embed(b)), Region(gallery.embed(a), mask=left)]
        rows.append(SheetRow(f"{a} left, {b} right", gallery.pair(a, b), gallery.variations(image_embeds=embeds)))
    return rows


def levels(gallery: Gallery) -> list[SheetRow]:
    """The shape of one image with the colours of another."""
    rows = []
    for a, b in ("fox", "panda"), ("fire", "helicopter"):
        embeds = [Region(gallery.embed(a), scale=SHAPE), Region(gallery.embed(b), scale=LOOK)]
        title = f"shape of {a}, colours of {b}"
        rows.append(SheetRow(title, gallery.pair(a, b), gallery.variations(image_embeds=embeds)))
    return rows


def interpolation(gallery: Gallery) -> list[SheetRow]:
    """Images between two images, with one seed."""
    rows = []
    for a, b in ("dog", "panda"), ("fox", "rabbit"):
        strip = []
        for t in torch.linspace(0, 1, 7).tolist():
            embeds = slerp(gallery.embed(a), gallery.embed(b), t)
            image = gallery.pipe(
                image_embeds=embeds, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=3
            ).images[0]
            strip.append((f"t = {t:.2f}", image))
        rows.append(SheetRow(f"{a} to {b}", gallery.pair(a, b), strip))
    return rows


def inpainting(gallery: Gallery) -> list[SheetRow]:
    """A half of an image repainted with the embedding of another, the rest kept."""
    rows = []
    for base, other, left in ("panda", "fox", 0), ("fire", "helicopter", 64):
        mask = Image.new("L", (128, 128))
        mask.paste(255, (left, 0, left + 64, 128))
        embeds = [Region(gallery.embed(base)), Region(gallery.embed(other), mask=mask)]
        made = gallery.variations(
            image_embeds=embeds, init_image=gallery.drawings[base], mask_image=mask, strength=0.9, paste=True
        )
        masked = gallery.drawings[base].resize((128, 128))
        masked.paste("#b4552d", mask=mask.point(lambda value: value // 3))
        photo = make_image_grid([masked, gallery.drawings[other].resize((128, 128))], rows=1, cols=2)
        rows.append(SheetRow(f"half of {base} by {other}", photo, made))
    return rows


def strength(gallery: Gallery) -> list[SheetRow]:
    """Variations that start from an image."""
    rows = []
    for value in 0.5, 0.7, 0.9:
        drawings = {"image": gallery.drawings["panda"], "init_image": gallery.drawings["dog"]}
        made = gallery.variations(**drawings, strength=value)
        rows.append(SheetRow(f"dog as panda, strength {value}", gallery.pair("dog", "panda"), made))
    return rows


GALLERIES: dict[str, Callable[[Gallery], list[SheetRow]]] = {
    "regions": regions,
    "levels": levels,
    "interpolation": interpolation,
    "inpainting": inpainting,
    "strength": strength,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(GALLERIES)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in GALLERIES]:
        parser.error(f"NAME: expected {', '.join(GALLERIES)}, got {unknown[0]}")
    args.out.mkdir(parents=True, exist_ok=True)
    gallery = Gallery()
    for name in args.names or GALLERIES:
        rows = GALLERIES[name](gallery)
        footer = f"imvar-emoji, {STEPS} steps of {type(gallery.pipe.scheduler).__name__}, guidance {GUIDANCE:g}"
        file = args.out / f"{name}.png"
        contact_sheet(rows, footer).quantize(256).save(file, optimize=True)
        print(file)


if __name__ == "__main__":
    main()
