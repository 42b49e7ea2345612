"""The judge's file: a test asset, in half precision, that knows the names of what it tells apart."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from train_emoji.networks import Namer


def write(judge: Namer, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in judge.cpu().state_dict().items()
    }
    save_file(tensors, path, {"names": " ".join(judge.names)})  # of two entries, the order in the file would vary


def read(path: Path) -> Namer:
    with safe_open(path, "pt") as file:
        names = file.metadata()["names"].split()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    judge = Namer(names, width=len(tensors["stages.0.down.0.weight"]))
    judge.load_state_dict(
        {name: tensor.float() if tensor.dtype == torch.half else tensor for name, tensor in tensors.items()}
    )
    return judge.eval()
