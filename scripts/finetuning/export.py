"""The trained weights as a checkpoint: an adapter, or a folder that imvar and diffusers load."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetuning.card import copied_notices, model_card
from finetuning.record import finish_record
from finetuning.settings import Settings
from finetuning.state import NAME, read_state
from finetuning.trainable import choose_parameters, copy_values
from imvar.atomic.file import atomic_write, write_text
from imvar.atomic.folder import atomic_folder
from imvar.loading import load_pipeline
from imvar.weights.lora import CONFIG_KEY
from imvar.weights.writing import write_tensors

ADAPTER = "pytorch_lora_weights.safetensors"
OF_THE_RUN = ("checkpoint", "revision", "stage", "rank", "alpha")


def export(settings: Settings, averaged: bool = True) -> Path:
    """Write what a run has trained up to its last save, and return the path: the average of the weights, if it has one.

    `OUT/pytorch_lora_weights.safetensors`, or `OUT/checkpoint`, the whole model, also with `merge`. Checkpoint and
    stage are those of the run, whatever the settings have. Raises `SystemExit` if the run has saved no state.
    """
    if not (settings.out / NAME).is_file():
        raise SystemExit(f"{settings.out / NAME}: expected the state of a run, got no such file; train first")
    state = read_state(settings.out)
    settings = replace(settings, **{name: state["recipe"][name] for name in OF_THE_RUN if name in state["recipe"]})
    pipe: Any = load_pipeline(settings.checkpoint, settings.revision, None, torch.float32)
    notices = copied_notices(pipe)
    is_average = averaged and bool(state["average"])
    values = state["average" if is_average else "parameters"]
    record = finish_record(settings, state, pipe, "moving average" if is_average else "last step")
    parameters = choose_parameters(pipe.unet, settings.stage, settings.rank, settings.alpha)
    for name in sorted(parameters.keys() | values.keys()):
        expected, got = (tuple(named[name].shape) if name in named else "none" for named in (parameters, values))
        if expected != got:
            path = settings.out / NAME
            raise SystemExit(f"{path}: {name}: expected shape {expected} of {settings.checkpoint}, got {got}")
    copy_values(parameters, values)
    if settings.stage == "lora":
        path = settings.out / ADAPTER
        write_adapter(path, pipe.unet, record)
        if not settings.merge:
            return path
        pipe.unet.unload_lora()
        pipe.load_lora_weights(path)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    with atomic_folder(settings.out / "checkpoint") as folder:
        pipe.save_pretrained(folder)
        write_text(folder / "training.json", f"{json.dumps(record, indent=2)}\n")
        write_text(folder / "README.md", model_card(record, notices))
        for notice in notices:
            atomic_write(folder / notice.name, lambda new, old=notice: shutil.copyfile(old, new))
    return settings.out / "checkpoint"


def write_adapter(path: Path, unet: Any, record: dict[str, Any]) -> None:
    """Write the adapter of a UNet, its config and the record of its training.

    alpha / r is multiplied into the matrices, so that its scale is 1 for readers that ignore the config, too.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in unet.named_modules():
        if hasattr(layer, "lora_A"):
            tensors[adapter_key(name, "down")] = layer.lora_A["default"].weight
            tensors[adapter_key(name, "up")] = layer.scaling["default"] * layer.lora_B["default"].weight
    config = unet.peft_config["default"]
    metadata = {"r": config.r, "lora_alpha": config.r, "target_modules": sorted(config.target_modules)}
    texts = {CONFIG_KEY: json.dumps({f"unet.{name}": value for name, value in metadata.items()})}
    tensors = {key: tensor.detach() for key, tensor in sorted(tensors.items())}
    write_tensors(path, tensors, metadata=texts | {"training": json.dumps(record), "format": "pt"})


def adapter_key(layer: str, half: str) -> str:
    """Return the name of a matrix in diffusers' first format, which all its versions and ComfyUI read."""
    if ".to_" in layer:
        return f"unet.{layer.removesuffix('.0').replace('.to_', '.processor.to_')}_lora.{half}.weight"
    return f"unet.{layer}.lora.{half}.weight"
