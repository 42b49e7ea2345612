"""What the tensors of a part say about its settings: files that hold weights alone have to be asked.

Counts are taken by asking whether a tensor is there, widths from shapes; no name is taken apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count, takewhile
from math import isqrt
from typing import Any

from ..errors import CheckpointError
from . import key_tables as tables
from .keymap import Dialect
from .published_config import PUBLISHED_CONFIGS
from .single_file import PartTensors

NOT_INFERABLE: dict[
    str, tuple[Any, dict[str, Any]]
] = {  # the published widths, and what goes with them but shows nowhere
    "unet": ([320, 640, 1280, 1280], {"attention_head_dim": 8, "norm_num_groups": 32, "sample_size": 64}),
    "vae": ([128, 256, 512, 512], {"norm_num_groups": 32, "scaling_factor": 0.18215}),
    "image_encoder": (1024, {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}),
    "safety_checker": (1024, {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}),
}

CLIP_HEAD, CLIP_WIDEST = 64, 1024  # channels of a head in every CLIP of OpenAI's, and of the largest; others differ

UNET = {  # the tensors that tell levels, layers and depth
    Dialect.PUBLISHED: (
        "down_blocks.{}.resnets.0.norm1.weight",
        "down_blocks.0.resnets.{}.norm1.weight",
        "mid_block.attentions.0.transformer_blocks.{}.norm1.weight",
    ),
}
VAE = {  # levels and layers
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


def infer_config(held: PartTensors) -> dict[str, Any]:
    """The settings of a part by its tensors, and by the published checkpoint in what no tensor shows.

    Raises `CheckpointError` naming a tensor without which they cannot be told.
    """
    return {"unet": unet, "vae": vae, "image_encoder": image_encoder, "safety_checker": safety_checker}[held.part](held)


def uninferable_warning(held: PartTensors, settings: Mapping[str, Any]) -> str | None:
    """What of these settings no tensor shows, in words, for a part of another size than the published one."""
    widths, untold = NOT_INFERABLE[held.part]
    vision = settings.get("vision_config", settings)
    if widths in (vision.get("block_out_channels"), vision.get("hidden_size")):
        return None
    taken = ", ".join(f"{name}={value!r}" for name, value in untold.items())
    return (
        f"the {held.part} is not of the published size, and nothing says whether {taken} are right for it, as they "
        "are for the published one; a folder with its settings would (config=, --config)"
    )


def published_config(part: str, image_size: int) -> dict[str, Any]:
    """The published settings of a part that has no weights, the feature extractor's for pictures of that size."""
    size = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
    return PUBLISHED_CONFIGS[part] | (size if part == "feature_extractor" else {})


def count_tensors(held: PartTensors, name: Callable[[int], str], first: int = 0) -> int:
    """How many of the numbered tensors are there, from the first one on."""
    return sum(1 for _ in takewhile(lambda i: held.has(name(i)), count(first)))


def unet(held: PartTensors) -> dict[str, Any]:
    if held.naming.dialect in UNET:
        levels, layers, depth = (count_tensors(held, template.format) for template in UNET[held.naming.dialect])
    else:  # the original counts resnets and changes of size through; a change of size ends a level
        layers = count_tensors(held, "input_blocks.{}.0.in_layers.0.weight".format, first=1)
        levels = 1 + count_tensors(held, lambda i: f"input_blocks.{i * (layers + 1)}.0.op.weight", first=1)
        depth = count_tensors(held, "middle_block.1.transformer_blocks.{}.norm1.weight".format)
    levels = max(levels, 1)
    found = tables.unet([True] * levels, [True] * levels, layers, depth)

    def attends(way: str) -> list[bool]:
        return [
            held.holds(found, *(f"{way}.{i}.attentions.0.{rest}" for rest in ("norm.weight", "proj_in.weight")))
            for i in range(levels)
        ]

    return PUBLISHED_CONFIGS["unet"] | {
        "in_channels": held.size(found, "conv_in.weight", 1),
        "out_channels": held.size(found, "conv_out.weight"),
        "block_out_channels": [held.size(found, f"down_blocks.{i}.resnets.0.conv1.weight") for i in range(levels)],
        "layers_per_block": layers,
        "transformer_layers_per_block": depth,
        "down_block_types": ["CrossAttnDownBlock2D" if there else "DownBlock2D" for there in attends("down_blocks")],
        "up_block_types": ["CrossAttnUpBlock2D" if there else "UpBlock2D" for there in attends("up_blocks")],
        "cross_attention_dim": held.size(found, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", 1),
    }


def vae(held: PartTensors) -> dict[str, Any]:
    levels, layers = (count_tensors(held, template.format) for template in VAE[held.naming.dialect])
    levels = max(levels, 1)
    found = tables.vae(levels, layers)
    return PUBLISHED_CONFIGS["vae"] | {
        "in_channels": held.size(found, "encoder.conv_in.weight", 1),
        "out_channels": held.size(found, "decoder.conv_out.weight"),
        "latent_channels": held.size(found, "post_quant_conv.weight"),
        "block_out_channels": [
            held.size(found, f"encoder.down_blocks.{i}.resnets.0.conv1.weight") for i in range(levels)
        ],
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def image_encoder(held: PartTensors) -> dict[str, Any]:
    layers = max(count_tensors(held, template.format) for template in CLIP[held.naming.dialect])
    found = tables.safety_checker(layers)
    width, patch = (
        held.size(found, "vision_model.embeddings.class_embedding"),
        held.size(found, "vision_model.embeddings.patch_embedding.weight", 2),
    )
    if width % CLIP_HEAD or width > CLIP_WIDEST:
        raise CheckpointError(
            f"no CLIP that is known here has {width} channels, so their heads cannot be told; "
            "a folder with the settings would do (config=)",
            path=held.path,
        )
    return PUBLISHED_CONFIGS["image_encoder"] | {
        "hidden_size": width,
        "intermediate_size": held.size(found, "vision_model.encoder.layers.0.mlp.fc1.weight"),
        "num_hidden_layers": layers,
        "num_attention_heads": width // CLIP_HEAD,
        "num_channels": held.size(found, "vision_model.embeddings.patch_embedding.weight", 1),
        "patch_size": patch,
        "image_size": isqrt(held.size(found, "vision_model.embeddings.position_embedding.weight") - 1) * patch,
        "projection_dim": held.size(found, "visual_projection.weight"),
    }


def safety_checker(held: PartTensors) -> dict[str, Any]:
    seen = image_encoder(held)
    return {"projection_dim": seen.pop("projection_dim"), "vision_config": seen}
