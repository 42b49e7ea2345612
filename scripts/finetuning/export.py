"""The trained weights as a checkpoint: an adapter, or a folder that imvar and diffusers load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetuning.settings import Settings
from finetuning.state import read_state
from finetuning.trainable import choose_parameters, copy_values
from imvar import StableDiffusionImageVariationPipeline


def export(settings: Settings) -> Path:
    """Write what a run has trained, averaged if it has averaged it, and return the path.

    `OUT/pytorch_lora_weights.safetensors`, or `OUT/checkpoint`, the model with the new weights, also with `merge`.
    """
    state = read_state(settings.out)
    pipe: Any = StableDiffusionImageVariationPipeline.from_pretrained(settings.checkpoint)
    parameters = choose_parameters(pipe.unet, settings.stage, settings.rank, settings.alpha)
    copy_values(parameters, (state["average"] or state["parameters"]).values())
    folder = settings.out / "checkpoint"
    if settings.stage == "lora":
        pipe.unet.save_lora_adapter(settings.out)
        if not settings.merge:
            return settings.out / "pytorch_lora_weights.safetensors"
        pipe.unet.unload_lora()
        pipe.load_lora_weights(settings.out)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    pipe.save_pretrained(folder)
    return folder
