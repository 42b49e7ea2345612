"""Reading files of tensors: nothing in them is ever run."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError
from .files import first_line, read_json
from .stems import Stem


def read_weights(folder: Path, stem: Stem, variant: str | None,
                 use_safetensors: bool | None) -> tuple[Path, dict[str, Tensor]]:
    """The tensors of a part, mapped rather than read where the format allows, and the file that named them."""
    try:
        first = folder / stem.choose((path.name for path in folder.iterdir()), variant, use_safetensors)[0]
    except CheckpointError as error:
        raise CheckpointError(error.reason, path=folder) from error
    return first, (read_shards(first) if first.suffix == ".json" else read_tensors(first))


def read_shards(index: Path) -> dict[str, Tensor]:
    """All tensors that an index lists, from the files beside it that it names."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError("has no weight_map from tensor to file name", path=index)
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or name in {"", ".", ".."}:
            raise CheckpointError(f"names {name!r}, which is not a file beside it", path=index)
        shard = read_tensors(index.parent / name)
        listed = {key for key, place in places.items() if place == name}
        if odd := sorted(listed ^ shard.keys()):
            raise CheckpointError(f"the index and {name} disagree on whether it holds this", path=index, key=odd[0])
        tensors |= shard
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in one safetensors or `torch.save` file. Nothing but tensors is ever unpickled."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError as error:
        raise CheckpointError("no such file", path=path) from error
    except pickle.UnpicklingError as error:
        names = re.search(r"GLOBAL (\S+)", str(error))
        fault = f"names {names[1]}, and nothing but tensors is ever unpickled" if names else "is no pickle of tensors"
        raise CheckpointError(f"cannot be read as a .bin file of tensors: it {fault}", path=path) from error
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = f"cannot be read as a {path.suffix} file of tensors: {first_line(error)}"
        raise CheckpointError(reason, path=path) from error
    if not isinstance(held, dict):
        raise CheckpointError(f"holds a {type(held).__name__}, not tensors by name", path=path)
    for name, tensor in held.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise CheckpointError("is not a dense tensor", path=path, key=str(name))
    return held
