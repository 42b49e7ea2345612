"""The shipped folder: six components in the published layout, in half precision, with model card and notices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from imvar import (
    AutoencoderKL,
    CLIPImageProcessor,
    CLIPVisionModelWithProjection,
    DDIMScheduler,
    StableDiffusionImageVariationPipeline,
    StableDiffusionSafetyChecker,
    UNet2DConditionModel,
)
from train_emoji.diffusion import SCHEDULER
from train_emoji.encoder import EXTRACTOR

HERE = Path(__file__).parent


def pipeline(
    vae: AutoencoderKL,
    image_encoder: CLIPVisionModelWithProjection,
    unet: UNet2DConditionModel,
    checker: StableDiffusionSafetyChecker | None,
    prediction: str,
) -> StableDiffusionImageVariationPipeline:
    return StableDiffusionImageVariationPipeline(
        vae=vae,
        image_encoder=image_encoder,
        unet=unet,
        safety_checker=checker,
        scheduler=DDIMScheduler(**SCHEDULER, prediction_type=prediction),
        feature_extractor=CLIPImageProcessor(**EXTRACTOR),
        requires_safety_checker=checker is not None,
    )


def write(folder: Path, pipe: StableDiffusionImageVariationPipeline, training: dict[str, Any]) -> None:
    """Save `pipe` in float16, with `training` as training.json, model card and notices."""
    pipe.to(torch.float16).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(training, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in ("README.md", "NOTICE"):
        shutil.copyfile(HERE / "texts" / name, folder / name)
