"""The judge's file: a test asset in half precision, with the class names in its metadata."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from train_emoji.networks import Classifier


def write(judge: Classifier, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in judge.cpu().state_dict().items()
    }
    save_file(tensors, path, {"names": " ".join(judge.names)})  # a single entry, since the order of several varies


def read(path: Path) -> Classifier:
    with safe_open(path, "pt") as file:
        names = file.metadata()["names"].split()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
    judge = Classifier(names, width=len(tensors["stages.0.down.0.weight"]))
    judge.load_state_dict(
        {name: tensor.float() if tensor.dtype == torch.half else tensor for name, tensor in tensors.items()}
    )
    return judge.eval()
