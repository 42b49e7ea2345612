"""Inference of a part's config from its tensors, for files with weights alone.

Counts come from the presence of tensors and widths from their shapes; no name is parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from math import isqrt
from typing import Any

from ..errors import CheckpointError, invalid
from . import key_tables as tables
from .keymap import Dialect
from .published_config import PUBLISHED_CONFIGS
from .single_file import PartTensors

NOT_INFERABLE: dict[str, tuple[Any, dict[str, Any]]] = {  # by part: published widths, and the fields that go with them
    "unet": ([320, 640, 1280, 1280], {"attention_head_dim": 8, "norm_num_groups": 32, "sample_size": 64}),
    "vae": ([128, 256, 512, 512], {"norm_num_groups": 32, "scaling_factor": 0.18215}),
    "image_encoder": (1024, {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}),
    "safety_checker": (1024, {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}),
}

CLIP_HEAD_DIM, MAX_CLIP_WIDTH = 64, 1024  # of OpenAI's CLIP models; larger ones, such as OpenCLIP's, have other heads

UNET = (  # published names of the tensors that count blocks, layers and depth
    "down_blocks.{}.resnets.0.norm1.weight",
    "down_blocks.0.resnets.{}.norm1.weight",
    "mid_block.attentions.0.transformer_blocks.{}.norm1.weight",
)
VAE = {  # blocks and layers
    Dialect.PUBLISHED: (
        "encoder.down_blocks.{}.resnets.0.norm1.weight",
        "encoder.down_blocks.0.resnets.{}.norm1.weight",
    ),
    Dialect.ORIGINAL: ("encoder.down.{}.block.0.norm1.weight", "encoder.down.0.block.{}.norm1.weight"),
}
CLIP = {  # layers
    Dialect.PUBLISHED: (
        "vision_model.encoder.layers.{}.layer_norm1.weight",
        "vision_model.vision_model.encoder.layers.{}.layer_norm1.weight",
    ),
    Dialect.ORIGINAL: ("visual.transformer.resblocks.{}.ln_1.weight",),
}


def infer_config(part: PartTensors) -> dict[str, Any]:
    """Return the config of a part by its tensors; fields that these do not determine are the published ones.

    Raises `CheckpointError` naming a missing tensor.
    """
    infer = {"unet": infer_unet, "vae": infer_vae, "image_encoder": infer_clip, "safety_checker": infer_checker}
    return infer[part.part](part)


def uninferable_warning(part: PartTensors, settings: Mapping[str, Any]) -> str | None:
    """Return a warning about fields that no tensor determines, for a part of another size than the published one."""
    widths, assumed_fields = NOT_INFERABLE[part.part]
    vision = settings.get("vision_config", settings)
    if widths in (vision.get("block_out_channels"), vision.get("hidden_size")):
        return None
    assumed = ", ".join(f"{name}={value!r}" for name, value in assumed_fields.items())
    return (
        f"the {part.part} is not of the published size, and its tensors do not determine {assumed}, which are assumed "
        "as in the published config; pass a folder with its config (config=, --config)"
    )


def published_config(part: str, image_size: int) -> dict[str, Any]:
    """Return the published config of a part without weights; a feature extractor's is for images of that size."""
    size = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
    return PUBLISHED_CONFIGS[part] | (size if part == "feature_extractor" else {})


def count_tensors(part: PartTensors, name: Callable[[int], str], first: int = 0) -> int:
    """Return how many numbered tensors there are, counted from `first` without a gap."""
    return next(i for i in count(first) if not part.has(name(i))) - first


def infer_unet(part: PartTensors) -> dict[str, Any]:
    """Return the config of a UNet."""
    if part.naming.dialect is Dialect.PUBLISHED:
        blocks, layers, depth = (count_tensors(part, template.format) for template in UNET)
    else:  # original names number resnets and downsamplers in one sequence; a downsampler ends a block
        layers = count_tensors(part, "input_blocks.{}.0.in_layers.0.weight".format, first=1)
        blocks = 1 + count_tensors(part, lambda i: f"input_blocks.{i * (layers + 1)}.0.op.weight", first=1)
        depth = count_tensors(part, "middle_block.1.transformer_blocks.{}.norm1.weight".format)
    blocks = max(blocks, 1)
    transformer = "mid_block.attentions.0.transformer_blocks"
    keymap = tables.unet([True] * blocks, layers)

    def block_types(direction: str) -> list[str]:
        prefixes = [f"{direction.lower()}_blocks.{i}.attentions.0" for i in range(blocks)]
        attends = [part.has_any(keymap, f"{prefix}.norm.weight", f"{prefix}.proj_in.weight") for prefix in prefixes]
        return [f"{'CrossAttn' * attention}{direction}Block2D" for attention in attends]

    return PUBLISHED_CONFIGS["unet"] | {
        "in_channels": part.dim_size(keymap, "conv_in.weight", 1),
        "out_channels": part.dim_size(keymap, "conv_out.weight"),
        "block_out_channels": [part.dim_size(keymap, f"down_blocks.{i}.resnets.0.conv1.weight") for i in range(blocks)],
        "layers_per_block": layers,
        "transformer_layers_per_block": depth,
        "down_block_types": block_types("Down"),
        "up_block_types": block_types("Up"),
        "cross_attention_dim": part.dim_size(keymap, f"{transformer}.0.attn2.to_k.weight", 1),
    }


def infer_vae(part: PartTensors) -> dict[str, Any]:
    """Return the config of an autoencoder."""
    blocks, layers = (count_tensors(part, template.format) for template in VAE[part.naming.dialect])
    blocks = max(blocks, 1)
    keymap = tables.vae(blocks, layers)
    return PUBLISHED_CONFIGS["vae"] | {
        "in_channels": part.dim_size(keymap, "encoder.conv_in.weight", 1),
        "out_channels": part.dim_size(keymap, "decoder.conv_out.weight"),
        "latent_channels": part.dim_size(keymap, "post_quant_conv.weight"),
        "block_out_channels": [
            part.dim_size(keymap, f"encoder.down_blocks.{i}.resnets.0.conv1.weight") for i in range(blocks)
        ],
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
    }


def infer_clip(part: PartTensors) -> dict[str, Any]:
    """Return the config of the vision tower and projection of an image encoder or a safety checker."""
    layers = max(count_tensors(part, template.format) for template in CLIP[part.naming.dialect])
    # The safety checker's rows serve both parts: the image encoder's, with the doubled prefix as well.
    keymap = tables.safety_checker(layers)
    width = part.dim_size(keymap, "vision_model.embeddings.class_embedding")
    patch = part.dim_size(keymap, "vision_model.embeddings.patch_embedding.weight", 2)
    if width % CLIP_HEAD_DIM or width > MAX_CLIP_WIDTH:
        expected = f"a multiple of {CLIP_HEAD_DIM} up to {MAX_CLIP_WIDTH} channels, to infer the number of heads"
        hint = "pass a folder with the config (config=, --config)"
        raise invalid(CheckpointError, part.path, expected, f"{width} channels", hint)
    return PUBLISHED_CONFIGS["image_encoder"] | {
        "hidden_size": width,
        "intermediate_size": part.dim_size(keymap, "vision_model.encoder.layers.0.mlp.fc1.weight"),
        "num_hidden_layers": layers,
        "num_attention_heads": width // CLIP_HEAD_DIM,
        "num_channels": part.dim_size(keymap, "vision_model.embeddings.patch_embedding.weight", 1),
        "patch_size": patch,
        "image_size": isqrt(part.dim_size(keymap, "vision_model.embeddings.position_embedding.weight") - 1) * patch,
        "projection_dim": part.dim_size(keymap, "visual_projection.weight"),
    }


def infer_checker(part: PartTensors) -> dict[str, Any]:
    """Return the config of a safety checker."""
    vision = infer_clip(part)
    return {"projection_dim": vision.pop("projection_dim"), "vision_config": vision}
