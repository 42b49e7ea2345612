"""Atomic writing of files of tensors, with the memory of one tensor."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

import huggingface_hub
import torch
from torch import Tensor

from ..atomic.file import atomic_write, write_text
from ..errors import InputError, InputTypeError, invalid, short_repr
from .filenames import WeightsName

DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}  # their names in safetensors, in the order in which it writes them
WRITE_CHUNK = 2**18  # bytes written, hashed and reported at a time; up to ten times as fast as 2**24

OnBytes = Callable[[int], Any]
"""Callback that receives the number of bytes written since its last call."""


@dataclass(frozen=True)
class WrittenFile:
    """A file of tensors that was written: their number, its size and, optionally, its SHA-256 in hexadecimal."""

    path: Path
    tensors: int
    bytes: int
    sha256: str | None


def write_weights(
    folder: Path,
    weights_name: WeightsName,
    tensors: Mapping[str, Tensor],
    *,
    variant: str | None = None,
    safe_serialization: bool = True,
    max_shard_size: int | str | None = None,
    **options: Any,
) -> list[WrittenFile]:
    """Write a part's tensors to `folder`, sharded if they are large, and remove the files that they replace.

    `options` are those of `write_tensors`. This alone is not atomic: call it within `atomic_folder`.
    """
    ending = "safetensors" if safe_serialization else "bin"
    parts = huggingface_hub.split_state_dict_into_shards_factory(  # imports huggingface_hub's other modules
        dict(tensors),
        max_shard_size=size_in_bytes(max_shard_size),
        get_storage_size=lambda tensor: tensor.numel() * tensor.itemsize,
        filename_pattern=f"{weights_name.basename(ending, variant)}{{suffix}}.{ending}",
    )
    files = parts.filename_to_tensors or {weights_name.file(ending, variant): []}
    written = [
        write_tensors(folder / name, {key: tensors[key] for key in keys}, **options) for name, keys in files.items()
    ]
    keep, index_name = set(files), weights_name.index(ending, variant)
    if parts.is_sharded:
        index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
        write_text(folder / index_name, json.dumps(index, indent=2, sort_keys=True) + "\n")
        keep.add(index_name)
    endings = [ending] if safe_serialization else ["bin", "safetensors"]  # safetensors would be read before pickles
    names = weights_name.file, weights_name.index, weights_name.shards
    replaced = [name(ending, variant) for name in names for ending in endings]
    for path in list(folder.iterdir()):
        if path.name not in keep and any(fnmatchcase(path.name, pattern) for pattern in replaced):
            path.unlink()
    return written


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    on_bytes: OnBytes | None = None,
    metadata: Mapping[str, str] | None = None,
    digest: bool = False,
    read: Callable[[str], Tensor] | None = None,
) -> WrittenFile:
    """Write one file atomically, in the format of its ending.

    A safetensors file is identical to that of safetensors' `save_file`, which requires a copy of all tensors on the
    CPU. Here each tensor is moved there and written in turn. Tensors that share memory are written separately. `read`
    returns the values of each tensor when it is written; the `tensors` may be on the meta device then.
    """
    read = read or tensors.__getitem__

    def values(name: str) -> Tensor:
        return move_to_cpu(name, read(name))

    def write_file(temporary: Path) -> WrittenFile:
        with temporary.open("wb") as file:
            writer = HashingWriter(file, on_bytes, hashlib.sha256() if digest else None)
            if path.suffix == ".safetensors":
                write_safetensors(writer, tensors, values, metadata or {})
            else:
                write_pickle(writer, {name: values(name) for name in tensors})
        return WrittenFile(path, len(tensors), writer.bytes, writer.hash.hexdigest() if writer.hash else None)

    return atomic_write(path, write_file)


class HashingWriter:
    """Binary file wrapper that counts, reports and, with a `hash`, hashes the bytes written.

    Hashing in another thread is not faster.
    """

    def __init__(self, file: BinaryIO, on_bytes: OnBytes | None, hash: Any):
        self.file, self.on_bytes, self.hash = file, on_bytes, hash
        self.bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data)
        for start in range(0, len(view), WRITE_CHUNK):
            chunk = view[start : start + WRITE_CHUNK]
            try:
                self.file.write(chunk)
            except OSError as error:
                self.error = error
                raise
            if self.hash:
                self.hash.update(chunk)
            self.bytes += len(chunk)
            if self.on_bytes:
                self.on_bytes(len(chunk))
        return len(view)

    def flush(self) -> None:
        self.file.flush()


def write_safetensors(
    writer: HashingWriter,
    tensors: Mapping[str, Tensor],
    values: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write the length of the header, the header and the tensors: widest dtype first, then by name."""
    order = {supported: place for place, supported in enumerate(DTYPES)}
    for name, tensor in tensors.items():
        if tensor.dtype not in order:
            raise invalid(InputTypeError, name, "a dtype that safetensors has", str(tensor.dtype), "save as a pickle")
    names = sorted(tensors, key=lambda name: (order[tensors[name].dtype], name.encode()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end = start + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    writer.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        writer.write(values(name).reshape(-1).view(torch.uint8).numpy())


def write_pickle(writer: HashingWriter, tensors: Mapping[str, Tensor]) -> None:
    """Write as `torch.save` does, but only the elements of each tensor, not all memory that it is a view of."""
    dense: dict[str, Tensor] = {}
    addresses = set()
    for name, tensor in tensors.items():
        shares = tensor.untyped_storage().nbytes() > tensor.nbytes or tensor.data_ptr() in addresses
        dense[name] = tensor.clone() if shares else tensor
        addresses.add(tensor.data_ptr())
    try:
        torch.save(dense, writer)  # type: ignore[arg-type]
    except RuntimeError:
        if writer.error:  # hidden by torch
            raise writer.error from None
        raise


def move_to_cpu(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, contiguous. Raises `InputError` if it is not dense or has no values."""
    if tensor.is_meta or tensor.layout != torch.strided:
        got = "one on the meta device" if tensor.is_meta else f"one with layout {tensor.layout}"
        raise invalid(InputError, name, "a dense tensor with values", got)
    return tensor.detach().cpu().contiguous()


def is_finite(tensor: Tensor) -> bool:
    return all(map(math.isfinite, value_range(tensor)))


def value_range(tensor: Tensor) -> tuple[float, float]:
    """Return the minimum and maximum, NaN if any value is, without a temporary tensor of the same size."""
    if not tensor.numel():
        return 0.0, 0.0
    values = tensor.detach().float() if tensor.dtype.itemsize == 1 else tensor.detach()  # aminmax has no 8-bit floats
    low, high = values.aminmax()
    return low.item(), high.item()


def size_in_bytes(size: int | str | None) -> int:
    """Return `max_shard_size`, a number or text such as "10GB" (the default), in bytes; 1 GB is 1000 MB."""
    value = "10GB" if size is None else size
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])B\s*", value, re.IGNORECASE)):
        value = float(match[1]) * 1000 ** ("KMGT".index(match[2].upper()) + 1)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value < float("inf"):
        raise invalid(InputError, "max_shard_size", "a number of bytes or text such as '10GB'", short_repr(size))
    return int(value)
