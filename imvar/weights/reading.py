"""Read files of tensors without executing anything that they contain."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor, nn

from ..checks import check_has_data
from ..errors import CheckpointError, InputTypeError, describe, first_line, invalid, short_repr
from .filenames import WeightsName
from .json_files import MAX_JSON_BYTES, parse_json, read_json, read_magic, reject_substitute, safe_join
from .read_errors import explain_read_error

IN_MEMORY = Path("(tensors in memory)")  # in errors, instead of a file
MAX_TENSORS = 2**13  # in one file, or in all shards of a part
PICKLE_ENDINGS = (".bin", ".ckpt", ".pt", ".pth")


def read_weights(
    folder: Path,
    weights_name: WeightsName,
    variant: str | None,
    use_safetensors: bool | None,
    disable_mmap: bool = False,
) -> tuple[Path, dict[str, Tensor]]:
    """Return a part's weights file, or the index of its shards, and the tensors as `read_tensors` does."""
    with explain_read_error(folder):
        names = [path.name for path in folder.iterdir()]
    try:
        name = weights_name.select(names, variant, use_safetensors)[0]
    except CheckpointError as error:
        raise error.at(folder) from error
    path = safe_join(folder, name)
    return path, (read_shards if path.suffix == ".json" else read_tensors)(path, disable_mmap)


def weights_files(path: Path) -> list[Path]:
    """Return the files of a part's weights: `path` itself, or the shards that this index lists."""
    if path.suffix != ".json":
        return [path]
    return [safe_join(path.parent, name) for name in sorted(set(read_json(path)["weight_map"].values()))]


def read_shards(index: Path, disable_mmap: bool = False) -> dict[str, Tensor]:
    """Return all tensors of a sharded checkpoint from the files that its index names."""
    weight_map = read_json(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(f, str) for f in weight_map.values())):
        expected = "a dictionary from tensor to file name"
        raise invalid(CheckpointError, index, expected, short_repr(weight_map), key="weight_map")
    if len(weight_map) > MAX_TENSORS:
        raise invalid(CheckpointError, index, f"at most {MAX_TENSORS} tensors", str(len(weight_map)))
    keys_by_file: dict[str, set[str]] = defaultdict(set)
    for key, name in weight_map.items():
        keys_by_file[name].add(key)
    tensors: dict[str, Tensor] = {}
    for name, keys in sorted(keys_by_file.items()):
        if Path(name).name != name or name in {"", ".", ".."} or name.endswith(".json"):
            raise invalid(CheckpointError, index, "a weights file next to the index", repr(name[:200]), key=min(keys))
        shard = read_tensors(safe_join(index.parent, name), disable_mmap)
        if differing := sorted(keys ^ shard.keys()):
            key = differing[0]
            expected, got = f"{name} with the tensors that the index lists", "without" if key in keys else "with"
            raise invalid(CheckpointError, index, expected, f"a file {got} this one", key=key)
        tensors |= shard
    return tensors


def read_tensors(path: Path, disable_mmap: bool = False) -> dict[str, Tensor]:
    """Return the tensors in a safetensors or `torch.save` file.

    They are memory-mapped if the format allows, unless `disable_mmap`: a change of the file in place changes mapped
    tensors, and the system kills a process that uses them after the file was cut short. The ending decides the format,
    or the first bytes if the ending is unknown. Raises `CheckpointError` with the file and what it is instead, or with
    the entry that is not a dense tensor.
    """
    if is_safetensors(path):
        return read_safetensors(path, disable_mmap)
    from .pickles import unpickle  # see weights/__init__.py

    return require_dense(require_names(unpickle(path, disable_mmap), path), path)


def read_checkpoint(path: Path, disable_mmap: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors in an original checkpoint, one file for the whole model, and the names of ignored entries.

    Ignored are those that training keeps next to the weights (`epoch`, `optimizer_states`, ...). The weights are under
    `state_dict` or, if there is none, all tensors at the top level.
    """
    if is_safetensors(path):
        return read_safetensors(path, disable_mmap), []
    from .pickles import unpickle

    entries = require_names(unpickle(path, disable_mmap, allow_training_state=True), path)
    weights = entries.get("state_dict")
    if weights is None:
        weights = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    if not isinstance(weights, dict) or not weights:
        raise invalid(CheckpointError, path, "tensors by name", "none", key="state_dict")
    ignored = [name for name in entries if name != "state_dict" and name not in weights]
    return require_dense(require_names(weights, path), path), ignored


def is_safetensors(path: Path) -> bool:
    """Return whether a file is safetensors rather than a pickle; raise `CheckpointError` if it is clearly neither."""
    magic, expected = read_magic(path), "a file of tensors"
    if magic[8:9] == b"{" and path.suffix not in PICKLE_ENDINGS:
        return True
    reject_substitute(magic, path, expected)
    if magic[8:9] == b"{":
        got, hint = f"safetensors in a file that ends in {path.suffix}", "rename it to .safetensors"
        raise invalid(CheckpointError, path, expected, got, hint)
    if magic.startswith((b"PK\3\4", b"\x80\2")) and path.suffix == ".safetensors":
        got, hint = "a pickle in a file that ends in .safetensors", "rename it to .bin or .ckpt"
        raise invalid(CheckpointError, path, expected, got, hint)
    if path.suffix in (".safetensors", *PICKLE_ENDINGS):
        return path.suffix == ".safetensors"
    if magic.startswith((b"PK", b"\x80")):
        return False
    raise invalid(CheckpointError, path, expected, "neither safetensors nor a file of torch.save")


def read_safetensors(path: Path, disable_mmap: bool = False) -> dict[str, Tensor]:
    read_header(path)
    with explain_read_error(path):
        try:
            return load(path.read_bytes()) if disable_mmap else load_file(path)
        except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise invalid(CheckpointError, path, "a safetensors file", f"an error: {first_line(error)}") from error


def read_metadata(path: Path) -> Mapping[str, str]:
    """Return the metadata of a safetensors file, or an empty dictionary for a pickle, which has none."""
    return (read_header(path).get("__metadata__") or {}) if is_safetensors(path) else {}


def read_header(path: Path) -> dict[str, Any]:
    """Return the header, checked for what the library accepts or reports unclearly.

    That is the size, duplicate names, and a truncated file.
    """
    expected = "a safetensors file"
    with explain_read_error(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        magic = file.read(1)
        if size < 10 or magic != b"{" or length > MAX_JSON_BYTES:
            got = f"one that does not begin as such (a header of {length} bytes, at most {MAX_JSON_BYTES} are allowed)"
            raise invalid(CheckpointError, path, expected, got)
        if length > size - 8:
            got = f"one cut short at {size} bytes, of which the header alone has {length}"
            raise invalid(CheckpointError, path, expected, got)
        header = parse_json(magic + file.read(length - 1), path)
    if len(header) > MAX_TENSORS + 1:
        raise invalid(CheckpointError, path, f"at most {MAX_TENSORS} tensors", str(len(header)))
    offsets = [
        entry["data_offsets"][-1:]
        for entry in header.values()
        if isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list)
    ]
    end = 8 + length + max((end for [end] in filter(None, offsets) if isinstance(end, int)), default=0)
    if end > size:
        raise invalid(CheckpointError, path, expected, f"one cut short at {size} bytes of {end}")
    return header


def check_tensors(name: str, entries: Mapping[Any, Any], expected: str) -> None:
    """Check the dictionary of tensors that the argument `name` may be instead of a path; `expected` has both."""
    for key, tensor in entries.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise invalid(InputTypeError, name, expected, f"{short_repr(key)}: {describe(tensor)}")
        check_has_data(key, tensor)


def require_names(entries: Any, path: Path) -> dict[str, Any]:
    """Return `entries` as a dictionary, or raise `CheckpointError` if they are not entries by name."""
    if not isinstance(entries, dict):
        raise invalid(CheckpointError, path, "tensors by name", f"a {type(entries).__name__}")
    if keys := [name for name in entries if not isinstance(name, str)]:
        raise invalid(CheckpointError, path, "tensors by name", f"a key of type {type(keys[0]).__name__}")
    return dict(dict.items(entries))  # an OrderedDict may have attributes from the file


def require_dense(entries: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the entries of a pickle as plain tensors; raise `CheckpointError` unless all are dense and complete."""
    for name, tensor in entries.items():
        if type(tensor) not in (Tensor, nn.Parameter):
            raise invalid(CheckpointError, path, "a dense tensor", f"a {type(tensor).__name__}", key=name)
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or not tensor.is_cpu:
            got = f"one of {tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise invalid(CheckpointError, path, "a dense tensor", got, key=name)
        n_bytes = tensor.untyped_storage().nbytes()
        if tensor.nbytes > n_bytes:
            expected = f"{tensor.nbytes} bytes for shape {tuple(tensor.shape)}"
            raise invalid(CheckpointError, path, expected, str(n_bytes), key=name)
    return {name: tensor.detach().resolve_neg() for name, tensor in entries.items()}
