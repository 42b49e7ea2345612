"""Files of tensors: which ones a folder holds, and reading and writing them."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError, InputTypeError
from .files import first_line, read_json, write_text, write_whole


@dataclass(frozen=True)
class Stem:
    """How the weights of a part are called, by format, before the endings."""

    safetensors: str
    pickle: str

    def named(self, ending: str, variant: str | None) -> str:
        stem = self.safetensors if ending == "safetensors" else self.pickle
        return f"{stem}.{variant}" if variant else stem

    def file(self, ending: str, variant: str | None) -> str:
        return f"{self.named(ending, variant)}.{ending}"

    def shards(self, ending: str, variant: str | None) -> str:
        return f"{self.named(ending, variant)}-*-of-*.{ending}"

    def index(self, ending: str, variant: str | None) -> str:
        return f"{self.named(ending, None)}.{ending}.index.{f'{variant}.' if variant else ''}json"

    def choose(self, names: Iterable[str] | None, variant: str | None, use_safetensors: bool | None) -> list[str]:
        """The patterns of the files to read, out of all `names`: safetensors before pickles, whole before shards.

        Where the names are not known, None, the patterns of all files that there may be.
        """
        endings = {None: ("safetensors", "bin"), True: ("safetensors",), False: ("bin",)}[use_safetensors]
        if names is None:
            return [f"{self.named(ending, None)}*.{ending}*" for ending in endings]
        names = set(names)
        for ending in endings:
            if self.file(ending, variant) in names:
                return [self.file(ending, variant)]
            if self.index(ending, variant) in names:
                return [self.index(ending, variant), self.shards(ending, variant)]
        looked = " or ".join(self.file(ending, variant) for ending in endings)
        raise CheckpointError(f"no weights here: looked for {looked}, whole or sharded")


DIFFUSERS = Stem("diffusion_pytorch_model", "diffusion_pytorch_model")
TRANSFORMERS = Stem("model", "pytorch_model")


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


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from itself or its name; float32 where nothing is asked for, None for `"auto"`: as the file has it."""
    if dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputTypeError(f"dtype={dtype!r}: a floating dtype such as torch.float16, its name, or 'auto' would do")
    return found
