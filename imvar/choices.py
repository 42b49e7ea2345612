"""Choices and defaults of the commands. Importing this module loads no library, so that `--help` is quick."""

from __future__ import annotations

from typing import Any

CHECKPOINT, REVISION = "lambdalabs/sd-image-variations-diffusers", "v2.0"
EMOJI = "imvar-emoji"
STEPS, EMOJI_STEPS = 50, 20
DTYPES = "float32", "bfloat16", "float16"
FLAG_NOTES = {"black": " and replaced by a black image", "blur": " and blurred", "keep": ""}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),  # as published
    "lms": ("LMSDiscreteScheduler", {"use_karras_sigmas": False}),
    "euler": ("EulerDiscreteScheduler", {"use_karras_sigmas": False}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
}
"""Classes with config changes: some published configs leave clip_sample on, which degrades latents."""
