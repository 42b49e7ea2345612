"""Reading files of tensors: nothing in them is ever run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError, first_line
from .filenames import WeightsName
from .json_files import MAX_JSON_BYTES, parse_json, read_json, read_magic, safe_join

MAX_TENSORS = 2**13  # in one file, or in all shards of one part
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def read_weights(
    folder: Path, stem: WeightsName, variant: str | None, use_safetensors: bool | None
) -> tuple[Path, dict[str, Tensor]]:
    """The tensors of a part, mapped rather than read where the format allows, and the file that named them."""
    try:
        name = stem.choose((path.name for path in folder.iterdir()), variant, use_safetensors)[0]
    except CheckpointError as error:
        raise CheckpointError(error.reason, path=folder) from error
    first = safe_join(folder, name)
    return first, (read_shards(first) if first.suffix == ".json" else read_tensors(first))


def read_shards(index: Path) -> dict[str, Tensor]:
    """All tensors that an index lists, from the files beside it that it names."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError("has no weight_map from tensor to file name", path=index)
    if len(places) > MAX_TENSORS:
        raise CheckpointError(f"lists {len(places)} tensors, more than {MAX_TENSORS}", path=index)
    listed: dict[str, set[str]] = defaultdict(set)
    for key, name in places.items():
        listed[name].add(key)
    tensors: dict[str, Tensor] = {}
    for name, keys in sorted(listed.items()):
        if Path(name).name != name or name in {"", ".", ".."} or name.endswith(".json"):
            raise CheckpointError(
                f"names {name[:200]!r}, which is not a file beside it that holds tensors", path=index, key=min(keys)
            )
        shard = read_tensors(safe_join(index.parent, name))
        if odd := sorted(keys ^ shard.keys()):
            raise CheckpointError(f"the index and {name} disagree on whether it holds this", path=index, key=odd[0])
        tensors |= shard
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in one safetensors or `torch.save` file, mapped rather than read where the format allows.

    The ending says which it is, or the first bytes where it says nothing. Raises `CheckpointError` naming the
    file and what it is instead, or the entry in it that is no dense tensor.
    """
    if is_safetensors(path):
        return read_safetensors(path)
    from .pickles import unpickle  # see weights/__init__.py

    return require_dense(require_names(unpickle(path), path), path)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors in an original checkpoint, one file for the whole model, and the names of what is left aside.

    That is what training keeps beside the weights (`epoch`, `optimizer_states`, ...), of which nothing is made.
    The weights are under `state_dict` or, where there is none, all tensors at the top.
    """
    if is_safetensors(path):
        return read_safetensors(path), []
    from .pickles import unpickle

    held = require_names(unpickle(path, standins=True), path)
    weights = held.get("state_dict")
    if weights is None:
        weights = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError("holds no tensors by name", path=path, key="state_dict")
    aside = [name for name in held if name != "state_dict" and name not in weights]
    return require_dense(require_names(weights, path), path), aside


def is_safetensors(path: Path) -> bool:
    """Whether this is one rather than a pickle; `CheckpointError` for a file that is plainly neither."""
    start = read_magic(path)
    if start[8:9] == b"{" and path.suffix not in PICKLES:
        return True
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            "cannot be read as a file of tensors: it is a git-lfs pointer, which stands for the real "
            "file; git lfs pull would fetch that",
            path=path,
        )
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise CheckpointError(
            "cannot be read as a file of tensors: it is a web page (HTML or XML), as a failed download leaves it",
            path=path,
        )
    if start[8:9] == b"{" or (start.startswith((b"PK\3\4", b"\x80\2")) and path.suffix == ".safetensors"):
        kind, ending = ("safetensors", ".safetensors") if start[8:9] == b"{" else ("a pickle", ".bin or .ckpt")
        raise CheckpointError(
            f"cannot be read as a file of tensors: it looks like {kind}, and ends in {path.suffix}; "
            f"a name that ends in {ending} would do",
            path=path,
        )
    if path.suffix in (".safetensors", *PICKLES):
        return path.suffix == ".safetensors"
    if start.startswith((b"PK", b"\x80")):
        return False
    raise CheckpointError("cannot be read as a file of tensors: it is neither safetensors nor of torch.save", path=path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    check_header(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot be read as a safetensors file: {first_line(error)}", path=path) from error


def check_header(path: Path) -> None:
    """What the library lets pass or says obscurely: a header of nonsense, names that are there twice, a short file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = file.read(1)
        if size < 10 or start != b"{" or length > MAX_JSON_BYTES:
            raise CheckpointError(
                "cannot be read as a safetensors file: it does not begin as one "
                f"(a header of {length} bytes, {MAX_JSON_BYTES} at the most)",
                path=path,
            )
        if length > size - 8:
            raise CheckpointError(
                f"cannot be read as a safetensors file: it is cut short at {size} bytes, and its "
                f"header alone has {length}",
                path=path,
            )
        header = parse_json(start + file.read(length - 1), path)
    if len(header) > MAX_TENSORS + 1:
        raise CheckpointError(f"holds {len(header)} tensors, more than {MAX_TENSORS}", path=path)
    ends = [
        entry["data_offsets"][-1:]
        for entry in header.values()
        if isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list)
    ]
    if (end := 8 + length + max((n for [n] in filter(None, ends) if isinstance(n, int)), default=0)) > size:
        raise CheckpointError(
            f"cannot be read as a safetensors file: it is cut short at {size} bytes of {end}", path=path
        )


def require_names(held: Any, path: Path) -> dict[str, Any]:
    """`held` as a dictionary by name, or a `CheckpointError`."""
    if not isinstance(held, dict):
        raise CheckpointError(f"holds a {type(held).__name__}, not tensors by name", path=path)
    if odd := [name for name in held if not isinstance(name, str)]:
        raise CheckpointError(f"holds something under a {type(odd[0]).__name__}, not under a name", path=path)
    return dict(dict.items(held))  # an OrderedDict comes with attributes that the file chose


def require_dense(held: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """These entries of a pickle as plain tensors, each of which has all of its numbers in the file."""
    for name, tensor in held.items():
        if (
            type(tensor) not in (Tensor, nn.Parameter)
            or tensor.layout != torch.strided
            or tensor.is_quantized
            or tensor.is_nested
            or not tensor.is_cpu
        ):
            raise CheckpointError(
                f"is a {type(tensor).__name__}, not a dense tensor"
                if type(tensor) is not Tensor
                else "is not a dense tensor",
                path=path,
                key=name,
            )
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"has shape {tuple(tensor.shape)}, but the file holds "
                f"{tensor.untyped_storage().nbytes()} bytes of it, not {tensor.nbytes}",
                path=path,
                key=name,
            )
    return {name: tensor.detach().resolve_neg() for name, tensor in held.items()}
