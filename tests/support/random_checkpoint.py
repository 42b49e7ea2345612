"""Write a tiny checkpoint in the published layout with seeded random weights.

    python tests/support/random_checkpoint.py FOLDER [--seed 0]

A run takes seconds; the images are coloured noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from imvar import (
    AutoencoderKL,
    CLIPImageProcessor,
    CLIPVisionModelWithProjection,
    PNDMScheduler,
    StableDiffusionImageVariationPipeline,
    StableDiffusionSafetyChecker,
    UNet2DConditionModel,
)

TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TINY_ENCODER = {**TINY_VISION, "projection_dim": 24}
TINY_CHECKER = {"vision_config": TINY_VISION, "projection_dim": 24}
TINY_UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
TINY_VAE = {
    "sample_size": 64,
    "block_out_channels": (8, 16, 16, 16),
    "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
TINY_EXTRACTOR = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
PUBLISHED_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "steps_offset": 1,
}


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Draw weights that preserve the variance of activations: N(0, 1/fan_in), small biases, scales around 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval()


def tiny_pipeline(seed: int = 0, **scheduler: object) -> StableDiffusionImageVariationPipeline:
    """Return a tiny pipeline of all six components with random weights; its safety checker flags hardly any image."""
    checker = StableDiffusionSafetyChecker(**TINY_CHECKER)
    parts = {
        "vae": AutoencoderKL(**TINY_VAE),
        "image_encoder": CLIPVisionModelWithProjection(**TINY_ENCODER),
        "unet": UNet2DConditionModel(**TINY_UNET),
        "safety_checker": checker,
    }
    for i, model in enumerate(parts.values()):
        randomize(model, seed + i)
    for thresholds in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        nn.init.constant_(thresholds, 0.9)
    return StableDiffusionImageVariationPipeline(
        **parts,
        scheduler=PNDMScheduler(**(PUBLISHED_SCHEDULER | scheduler)),
        feature_extractor=CLIPImageProcessor(**TINY_EXTRACTOR),
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tiny_pipeline(args.seed).save_pretrained(args.folder)
    print(f"{args.folder}: a checkpoint with random weights, seed {args.seed}")


if __name__ == "__main__":
    main()
