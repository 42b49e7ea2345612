"""Tiny versions of the published sizes: shapes and configs shrink in proportion, tensor names stay the same.

The numbers of heads and groups stay the same; CLIP has its first two layers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

# By part: sizes from the first number up are divided by the second, with exceptions.
RULES: dict[str, tuple[int, int, dict[int, int]]] = {
    "unet": (320, 10, {768: 24}),
    "vae": (128, 4, {}),
    "image_encoder": (1024, 16, {768: 24, 257: 5}),  # 2 x 2 patches and the class token
    "safety_checker": (1024, 16, {768: 24, 257: 5}),
    "text": (768, 32, {}),
}
LAYERS = 2
VISION = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": LAYERS, "image_size": 28}
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "unet/config.json": {"block_out_channels": [32, 64, 128, 128], "cross_attention_dim": 24, "sample_size": 8},
    "vae/config.json": {"block_out_channels": [32, 64, 128, 128], "sample_size": 64},
    "image_encoder/config.json": {**VISION, "projection_dim": 24},
    "safety_checker/config.json": {"vision_config": VISION, "vision_config_dict": VISION, "projection_dim": 24},
    "feature_extractor/preprocessor_config.json": {
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
    },
}


def tiny_shape(part: str, shape: list[int]) -> list[int]:
    """Return the tiny shape for the published shape of a tensor."""
    min_size, divisor, exceptions = RULES[part]
    return [exceptions.get(size, size // divisor if size >= min_size else size) for size in shape]


def is_in_tiny(name: str) -> bool:
    """Return whether a tiny model has a tensor of that name."""
    layer = re.search(r"\.(?:layers|resblocks)\.(\d+)\.", name)
    return layer is None or int(layer[1]) < LAYERS


def shrink_configs(folder: Path) -> None:
    """Make the configs of a folder in the published layout tiny, in place."""
    for file, changes in TINY_CONFIGS.items():
        config = json.loads((folder / file).read_text())
        for key, value in changes.items():
            config[key] = config[key] | value if isinstance(value, dict) else value
        (folder / file).write_text(json.dumps(config, indent=2) + "\n")
