"""Config fields of the published v2.0 checkpoint that differ from diffusers' defaults.

Original files contain weights only; these are the fields that cannot be inferred from tensors. The scheduler's are of
the `main` revision, where `clip_sample=False` is set for DDIM.
"""

from __future__ import annotations

from typing import Any

VIT_L_14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}

PUBLISHED_CONFIGS: dict[str, dict[str, Any]] = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768},
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "sample_size": 256,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "image_encoder": {**VIT_L_14, "projection_dim": 768},
    "safety_checker": {"vision_config": VIT_L_14, "projection_dim": 768},
    "scheduler": {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    },
    "feature_extractor": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "do_convert_rgb": True,
        "resample": 3,
    },
}


def has_legacy_sample_size(config: Any) -> bool:
    """Return whether a UNet config has the sample_size below 64 that was a wrong default before diffusers 0.9."""
    version = str(config.get("_diffusers_version", "")).split(".")[:2]
    is_old = all(part.isdecimal() and len(part) < 9 for part in version) and [int(part) for part in version] < [0, 9]
    return is_old and isinstance(config.sample_size, int) and config.sample_size < 64
