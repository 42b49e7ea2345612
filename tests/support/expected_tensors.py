"""Tensors that original files become by the published lists, without any table of imvar, and those in a folder."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.original_checkpoint import Row, original, original_keys

Parts = dict[str, dict[str, Tensor]]


def target_tensors(row: Row, tensor: Tensor) -> list[Tensor]:
    """Return the tensor for each target of an original one."""
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


def listed_tensors(layout: str, average: bool = True) -> Parts:
    """Return the tensors of a layout by part and diffusers' name, with the UNet's averaged or raw weights."""
    tensors, parts = original(layout, flat=layout == "v2"), {}
    tensors = tensors.get("state_dict", tensors)
    other = "model." if average else "model_ema."
    for row in original_keys(layout, tiny=True):
        if not row.name.startswith(other):
            for target, tensor in zip(row.targets, target_tensors(row, tensors[row.name]), strict=True):
                part, _, name = target.partition("/")
                parts.setdefault(part, {})[name] = tensor
    return parts


def stored_tensors(folder: Path) -> Parts:
    """Return the tensors in the safetensors files of a folder, by part."""
    parts: Parts = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        parts.setdefault(file.parent.name, {}).update(load_file(file))
    return parts


def is_identical(a: Tensor, b: Tensor) -> bool:
    """Return whether shape, dtype and every bit are equal."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))
    )


def same_tensors(a: Parts, b: Parts) -> bool:
    """Assert that two checkpoints have the same tensors; return whether there are any."""
    assert {part: sorted(tensors) for part, tensors in a.items()} == {
        part: sorted(tensors) for part, tensors in b.items()
    }
    assert not [(part, name) for part in a for name in a[part] if not is_identical(a[part][name], b[part][name])]
    return bool(a)


def config_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a config, and of a config within it, without extra ones."""
    return {
        field.name: config_fields(value) if is_dataclass(value := config[field.name]) else value
        for field in fields(config)
    }


def file_contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file, by its path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
