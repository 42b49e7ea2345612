"""Convert checkpoints with diffusers, for the comparison in scripts/benchmark_convert.py.

    python scripts/benchmark_convert_diffusers.py FOLDER TARGET [--dtype keep|fp16]  # the pipeline, as safetensors
    python scripts/benchmark_convert_diffusers.py FILE TARGET --config FOLDER         # UNet and VAE of an original file

It reads original files that contain raw weights and only tensors, and ignores the image encoder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionImageVariationPipeline, UNet2DConditionModel

CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--dtype", choices=("keep", "fp16"), default="keep")
    parser.add_argument("--config", type=Path)
    args = parser.parse_args()
    dtype = {"keep": None, "fp16": torch.float16}[args.dtype]
    if args.source.is_dir():
        pipe = StableDiffusionImageVariationPipeline.from_pretrained(args.source, torch_dtype=dtype)
        pipe.save_pretrained(args.target)
        return
    for part, cls in CLASSES.items():
        model = cls.from_single_file(
            str(args.source), config=str(args.config), subfolder=part, torch_dtype=dtype, local_files_only=True
        )
        model.save_pretrained(args.target / part)


if __name__ == "__main__":
    main()
