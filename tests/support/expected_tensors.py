"""What the lists of tensors say becomes of an original file, and what is stored: no table of imvar's takes part."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.original_checkpoint import Row, original, original_keys

Parts = dict[str, dict[str, Tensor]]


def pieces(row: Row, tensor: Tensor) -> list[Tensor]:
    """What becomes of one tensor, for each of its targets."""
    match row.op:
        case "squeeze_hw":
            return [tensor[:, :, 0, 0]]
        case "split3_dim0":
            return list(tensor.chunk(3))
        case "transpose":
            return [tensor.T]
        case "drop":
            return []
    return [tensor]


def listed(layout: str, average: bool = True) -> Parts:
    """The tensors by part and by diffusers' names, the UNet's averaged or raw."""
    tensors, parts = original(layout, flat=layout == "v2"), {}
    tensors = tensors.get("state_dict", tensors)
    other = "model." if average else "model_ema."
    for row in original_keys(layout, tiny=True):
        if not row.name.startswith(other):
            for target, tensor in zip(row.targets, pieces(row, tensors[row.name]), strict=True):
                part, _, name = target.partition("/")
                parts.setdefault(part, {})[name] = tensor
    return parts


def stored(folder: Path) -> Parts:
    """The tensors in the safetensors files of a folder of parts, by part."""
    parts: Parts = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        parts.setdefault(file.parent.name, {}).update(load_file(file))
    return parts


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit, in shape and dtype too."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))
    )


def agree(a: Parts, b: Parts) -> bool:
    """Whether all parts have all tensors, and the same ones."""
    assert {part: sorted(tensors) for part, tensors in a.items()} == {
        part: sorted(tensors) for part, tensors in b.items()
    }
    assert not [(part, name) for part in a for name in a[part] if not same(a[part][name], b[part][name])]
    return bool(a)


def settings(config: Any) -> dict[str, Any]:
    """What a config says in its own fields, and in those of a config within it, whatever else came with it."""
    return {
        field.name: settings(value) if is_dataclass(value := config[field.name]) else value for field in fields(config)
    }


def bytes_in(folder: Path) -> dict[str, bytes]:
    """Every file, by its path within the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
