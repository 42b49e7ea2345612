"""What diffusers can do of what weights_convert.py does: the rival of scripts/benchmark_convert.py.

    python scripts/benchmark_convert_diffusers.py FOLDER TARGET [--dtype keep|fp16]  # the pipeline, as safetensors
    python scripts/benchmark_convert_diffusers.py FILE TARGET --config FOLDER      # UNet and VAE of an original file

Of the original files it takes those with raw weights and nothing but tensors, and it leaves the image encoder aside.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionImageVariationPipeline, UNet2DConditionModel

PARTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}


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
    for part, kind in PARTS.items():
        model = kind.from_single_file(
            str(args.source), config=str(args.config), subfolder=part, torch_dtype=dtype, local_files_only=True
        )
        model.save_pretrained(args.target / part)


if __name__ == "__main__":
    main()
