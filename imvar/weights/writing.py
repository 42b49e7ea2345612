"""Writing files of tensors, each whole or not at all, one tensor at a time."""

from __future__ import annotations

import hashlib
import json
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
from ..errors import InputError, InputTypeError
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
}  # what safetensors calls them, in the order in which it writes them
WRITE_CHUNK = 2**18  # bytes written, hashed and reported at a time: measured to be up to ten times as fast as 2**24

OnBytes = Callable[[int], Any]
"""Is told how many more bytes are written."""


@dataclass(frozen=True)
class WrittenFile:
    """A file of tensors that was written: how many of them, its size and, if asked for, its SHA-256 in hexadecimal."""

    path: Path
    tensors: int
    bytes: int
    sha256: str | None


def write_weights(
    folder: Path,
    stem: WeightsName,
    tensors: Mapping[str, Tensor],
    *,
    variant: str | None = None,
    safe_serialization: bool = True,
    max_shard_size: int | str | None = None,
    dtype: torch.dtype | None = None,
    on_bytes: OnBytes | None = None,
    digest: bool = False,
) -> list[WrittenFile]:
    """Write a part's tensors into `folder`, in shards if they are large, and remove what they replace.

    Floating tensors are written as `dtype`, where one is given. The folder is a mix of old and new
    meanwhile: call this inside `replaced`.
    """
    ending = "safetensors" if safe_serialization else "bin"
    parts = huggingface_hub.split_state_dict_into_shards_factory(  # imported no sooner than here
        dict(tensors),
        max_shard_size=size_in_bytes(max_shard_size),
        get_storage_size=lambda tensor: tensor.numel() * written_dtype(tensor, dtype).itemsize,
        filename_pattern=f"{stem.named(ending, variant)}{{suffix}}.{ending}",
    )
    files = parts.filename_to_tensors or {stem.file(ending, variant): []}
    written = [
        write_tensors(folder / name, {key: tensors[key] for key in keys}, dtype=dtype, on_bytes=on_bytes, digest=digest)
        for name, keys in files.items()
    ]
    keep = set(files)
    if parts.is_sharded:
        index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
        write_text(folder / stem.index(ending, variant), json.dumps(index, indent=2, sort_keys=True) + "\n")
        keep.add(stem.index(ending, variant))
    endings = [ending] if safe_serialization else ["bin", "safetensors"]  # which would be read in place of pickles
    replaced = [name(ending, variant) for name in (stem.file, stem.index, stem.shards) for ending in endings]
    for path in list(folder.iterdir()):
        if path.name not in keep and any(fnmatchcase(path.name, pattern) for pattern in replaced):
            path.unlink()
    return written


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    on_bytes: OnBytes | None = None,
    metadata: Mapping[str, str] | None = None,
    digest: bool = False,
) -> WrittenFile:
    """One file, whole or not at all, in the format of its ending; floating tensors as `dtype`, where one is given.

    A safetensors file is the same, byte for byte, as the library's own `save_file` writes. That one wants all tensors
    at once, on the CPU and in the dtype to write, so that casting a model, or taking it from a GPU, would hold a second
    copy of it. Here each tensor is moved, cast and written in turn. Tensors that share memory are written each.
    """

    def write(temporary: Path) -> WrittenFile:
        with temporary.open("xb") as file:
            sink = HashingWriter(file, on_bytes, hashlib.sha256() if digest else None)
            if path.suffix == ".safetensors":
                write_safetensors(sink, tensors, dtype, metadata or {})
            else:
                write_pickle(sink, tensors, dtype)
        return WrittenFile(path, len(tensors), sink.bytes, sink.hash.hexdigest() if sink.hash else None)

    return atomic_write(path, write)


class HashingWriter:
    """A file that is written to: what passes is counted, reported and, with a `hash`, hashed.

    Hashing while another thread writes was measured to be no faster.
    """

    def __init__(self, file: BinaryIO, on_bytes: OnBytes | None, hash: Any):
        self.file, self.on_bytes, self.hash = file, on_bytes, hash
        self.bytes = 0
        self.fault: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data)
        for start in range(0, len(view), WRITE_CHUNK):
            piece = view[start : start + WRITE_CHUNK]
            try:
                self.file.write(piece)
            except OSError as error:
                self.fault = error
                raise
            if self.hash:
                self.hash.update(piece)
            self.bytes += len(piece)
            if self.on_bytes:
                self.on_bytes(len(piece))
        return len(view)

    def flush(self) -> None:
        self.file.flush()


def write_safetensors(
    sink: HashingWriter, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> None:
    """The length of the header, the header, and the tensors end to end: the widest dtype first, then by name."""
    order = {found: place for place, found in enumerate(DTYPES)}
    if odd := [name for name, tensor in tensors.items() if written_dtype(tensor, dtype) not in order]:
        raise InputTypeError(f"{odd[0]}: a safetensors file cannot hold {written_dtype(tensors[odd[0]], dtype)}")
    names = sorted(tensors, key=lambda name: (order[written_dtype(tensors[name], dtype)], name.encode()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in names:
        kind, start = written_dtype(tensors[name], dtype), end
        end += tensors[name].numel() * kind.itemsize
        header[name] = {"dtype": DTYPES[kind], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        sink.write(as_written(name, tensors[name], dtype).reshape(-1).view(torch.uint8).numpy())


def write_pickle(sink: HashingWriter, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """As `torch.save` does, which takes all tensors at once, and writes the whole memory that each is a view of."""
    dense: dict[str, Tensor] = {}
    places = set()
    for name, tensor in tensors.items():
        tensor = as_written(name, tensor, dtype)
        shares = tensor.untyped_storage().nbytes() > tensor.nbytes or tensor.data_ptr() in places
        dense[name] = tensor.clone() if shares else tensor
        places.add(tensor.data_ptr())
    try:
        torch.save(dense, sink)  # type: ignore[arg-type]
    except RuntimeError:
        if sink.fault:  # which torch has swallowed
            raise sink.fault from None
        raise


def written_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def as_written(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor on the CPU, end to end in memory, in the dtype to write; an error where values would become infinite."""
    if tensor.is_meta or tensor.layout != torch.strided:
        raise InputError(f"{name}: a tensor with no values (on the meta device), or not dense, cannot be written")
    cast = tensor.detach().to("cpu", written_dtype(tensor, dtype)).contiguous()
    if cast.dtype != tensor.dtype and not is_finite(cast) and is_finite(tensor):
        raise InputError(f"{name}: has values that are beyond {cast.dtype}; bfloat16 or float32 would do")
    return cast


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, told without another tensor of this size."""
    wide = tensor.detach().float() if tensor.dtype.itemsize == 1 else tensor.detach()  # few functions take 8 bits
    return not wide.numel() or all(bool(bound.isfinite()) for bound in wide.aminmax())


def size_in_bytes(size: int | str | None) -> int:
    """`max_shard_size` as a number: whole bytes, or text such as "10GB", a thousand MB each, which is also None."""
    size = "10GB" if size is None else size
    number = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])B\s*", size, re.IGNORECASE) if isinstance(size, str) else None
    if number:
        found = float(number[1]) * 1000 ** ("KMGT".index(number[2].upper()) + 1)
    else:
        found = size if isinstance(size, (int, float)) and not isinstance(size, bool) else 0
    if not 1 <= found < float("inf"):
        raise InputError(f"max_shard_size={size!r}: a number of bytes, or text such as '10GB' or '500MB', would do")
    return int(found)
