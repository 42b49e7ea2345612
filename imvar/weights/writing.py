"""Writing files of tensors, each whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from .files import write_text, write_whole
from .stems import Stem


def write_weights(folder: Path, stem: Stem, tensors: Mapping[str, Tensor], *, variant: str | None = None,
                  safe_serialization: bool = True, max_shard_size: int | str = "10GB") -> None:
    """Write a part's tensors into `folder`, in shards if they are large, and remove what they replace."""
    ending = "safetensors" if safe_serialization else "bin"
    file = stem.file(ending, variant)
    pattern = f"{stem.named(ending, variant)}{{suffix}}.{ending}"
    parts = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size, filename_pattern=pattern)
    for name, keys in parts.filename_to_tensors.items():
        write_tensors(folder / name, {key: tensors[key] for key in keys})
    written = set(parts.filename_to_tensors)
    if parts.is_sharded:
        index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
        write_text(folder / stem.index(ending, variant), json.dumps(index, indent=2, sort_keys=True) + "\n")
        written.add(stem.index(ending, variant))
    for path in list(folder.iterdir()):
        replaced = (file, stem.index(ending, variant), stem.shards(ending, variant))
        if path.name not in written and any(fnmatchcase(path.name, pattern) for pattern in replaced):
            path.unlink()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One file, whole or not at all, in the format of its ending. Tensors that share memory are written each."""
    dense, places = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        dense[name] = tensor.clone() if tensor.data_ptr() in places else tensor
        places.add(tensor.data_ptr())
    if path.suffix == ".safetensors":
        write_whole(path, lambda temporary: save_file(dense, temporary, metadata={"format": "pt"}))
    else:
        write_whole(path, lambda temporary: torch.save(dense, temporary))
