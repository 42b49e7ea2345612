"""Tiny checkpoints in every layout, to be corrupted: the same bytes in every run, so that cases are reproducible."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image
from safetensors.torch import save_file
from torch import Tensor, nn

import imvar
from imvar import StableDiffusionImageVariationPipeline
from imvar.conversion import convert
from imvar.image.load_image import FORMATS, check_formats
from imvar.weights.single_file import EMA, ORIGINAL_NAMINGS, RAW
from tests.support.original_checkpoint import lightning, write
from tests.support.random_checkpoint import randomize, tiny_pipeline

LOADERS: dict[str, Any] = {
    "unet": imvar.UNet2DConditionModel,
    "vae": imvar.AutoencoderKL,
    "image_encoder": imvar.CLIPVisionModelWithProjection,
    "safety_checker": imvar.StableDiffusionSafetyChecker,
    "scheduler": imvar.PNDMScheduler,
    "feature_extractor": imvar.CLIPImageProcessor,
}
SMALL_VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SMALLEST = {
    "unet": {
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "norm_num_groups": 4,
        "up_block_types": ("CrossAttnUpBlock2D",),
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "sample_size": 8,
    },
    "vae": {"block_out_channels": (4,), "norm_num_groups": 2, "sample_size": 8, "layers_per_block": 1},
    "image_encoder": SMALL_VISION | {"projection_dim": 8},
    "safety_checker": {"vision_config": SMALL_VISION, "projection_dim": 8},
}
INFERABLE = {  # the smallest parts whose config can be inferred from their tensors: published groups and heads
    "unet": {
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "layers_per_block": 1,
        "up_block_types": ("CrossAttnUpBlock2D",),
        "cross_attention_dim": 8,
    },
    "vae": {"block_out_channels": (32,), "layers_per_block": 1},
    "image_encoder": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
        "projection_dim": 8,
    },
}


def write_corpus(folder: Path) -> None:
    """Write parts in every layout, `folder/layout/part`, a pipeline, files, `folder/single/layout`, and images.

    The images are in `folder/images/format`.
    """
    torch.manual_seed(0)
    pipe = tiny_pipeline()
    parts = dict(pipe.components) | {name: LOADERS[name](**settings) for name, settings in SMALLEST.items()}
    for layout, options in {
        "safetensors": {},
        "bin": {"safe_serialization": False},
        "sharded": {"max_shard_size": "6KB"},
    }.items():
        for name, part in parts.items():
            if layout == "safetensors" or isinstance(part, nn.Module):
                part.save_pretrained(folder / layout / name, **options)
    old = folder / "old" / "unet"
    shutil.copytree(folder / "bin" / "unet", old)
    weights = torch.load(old / "diffusion_pytorch_model.bin", weights_only=True)
    torch.save(weights, old / "diffusion_pytorch_model.bin", _use_new_zipfile_serialization=False)
    StableDiffusionImageVariationPipeline(**parts).save_pretrained(folder / "pipeline")
    (folder / "original").mkdir()
    nested = {"epoch": 3, "state_dict": weights, "optimizer_states": [{"state": {0: torch.ones(3)}}], "hparams": None}
    torch.save(nested, folder / "original" / "nested.ckpt")
    torch.save(weights, folder / "original" / "flat.pt")
    save_file(weights, folder / "original" / "model.safetensors")
    for name, content in original_contents().items():
        (folder / "single" / name).mkdir(parents=True)
        write(folder / "single" / name / "model.ckpt", content)
    save_file(original_contents()["v2"]["state_dict"], folder / "single" / "v2" / "model.safetensors")
    convert(folder / "pipeline", folder / "single" / "imvar" / "model.safetensors", to="original")
    write_images(folder / "images")


def write_images(folder: Path) -> None:
    """Write an image in each format that `load_image` reads, of several frames where it has them, and with EXIF."""
    frames = [Image.radial_gradient("L").rotate(angle).resize((40, 24)).convert("RGB") for angle in (0, 30)]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name in check_formats(FORMATS):
        kinds = ["raw", "tiff_lzw", "tiff_deflate", "jpeg"] if name == "TIFF" else [None]
        for kind in kinds:
            path = folder / name / f"image-{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            options: dict[str, Any] = {} if name == "AVIF" else {"exif": exif}  # with both, Pillow 13 crashes
            if name not in ("JPEG", "BMP"):
                options |= {"save_all": True, "append_images": frames[1:]}
            if kind:
                options["compression"] = kind
            with suppress(OSError):  # of an AVIF without support of it
                frames[0].save(path, name, **options)


def original_contents() -> dict[str, dict[str, Any]]:
    """Return the content of a file in each original layout."""
    models = {name: randomize(LOADERS[name](**settings), 0).half() for name, settings in INFERABLE.items()}
    named = {
        naming: models[part].keymap.to_file(models[part].state_dict(), naming)
        for part, namings in ORIGINAL_NAMINGS.items()
        for naming in namings
    }
    (autoencoder,), (clip, hugging_face) = ORIGINAL_NAMINGS["vae"], ORIGINAL_NAMINGS["image_encoder"]
    average = named[EMA] | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(9)}

    def merged(*dicts: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
        return OrderedDict(item for tensors in dicts for item in tensors.items())

    return {
        "full": lightning(merged(named[RAW], average, named[autoencoder], named[clip]), {}),
        "ema_only": merged(average, named[autoencoder], named[clip], {"betas": torch.ones(3)}),
        "v2": {"state_dict": dict(merged(named[RAW], named[autoencoder], named[hugging_face]))},
        "vae": {
            "state_dict": {
                name.removeprefix(autoencoder.prefix): tensor for name, tensor in named[autoencoder].items()
            },
            "global_step": 3,
        },
    }
