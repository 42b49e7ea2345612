"""Tensors that are memory-mapped from a file: copies of them, and the return of their pages to the system.

Copies are made so that a file that is cut short meanwhile is an error: a process that reads mapped memory beyond the
end of the file is killed (SIGBUS). A system call that reads it fails with EFAULT instead, so the kernel makes the copy,
through a pipe. To read the files without mapping them would need the position of each tensor, which `torch.load` does
not return, or the memory of a whole file.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic.folder import UNCHANGED
from ..errors import CheckpointError, invalid
from ..malloc import libc_function

PIPE_CHUNK = 2**16  # bytes, the usual capacity of a pipe
MAPS = Path("/proc/self/maps")


def mapped_bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor as bytes, from its first to its last element, without a copy."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((steps + 1 if tensor.numel() else 0,), (1,)).view(torch.uint8)


def copy_mapped(tensor: Tensor, path: Path | None = None, key: str | None = None) -> Tensor:
    """Return a copy of a tensor with the same strides.

    Raises `CheckpointError` about the file `path` and the tensor `key` in it if the file was cut short.
    """
    tensor = tensor.detach()
    if os.name != "posix" or type(tensor) is not Tensor or not tensor.is_cpu or tensor.layout != torch.strided:
        return tensor.clone()  # it is not mapped, or on Windows, which refuses to cut mapped files
    source = mapped_bytes(tensor)
    copy = torch.empty_like(source)
    try:
        copy_through_pipe(source.numpy(), copy.numpy())
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        raise invalid(CheckpointError, path, UNCHANGED, "a file that was cut short", key=key) from error
    return copy.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def copy_through_pipe(source: Any, target: Any) -> None:
    """Copy an array of bytes to another by system calls alone."""
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)  # it returns how much fits
        copied = 0
        while copied < len(source):
            end = copied + os.write(writer, source[copied : copied + PIPE_CHUNK])
            while copied < end:
                copied += os.readv(reader, [target[copied:end]])
    finally:
        os.close(reader)
        os.close(writer)


class MappedFiles:
    """Where this process has `files` memory-mapped (Linux; elsewhere no place is known).

    Pages of a mapped file that were read count as memory of the process until they are returned to the system.
    """

    def __init__(self, files: Iterable[Path]):
        names, maps = {os.path.realpath(file) for file in files}, b""
        with suppress(OSError):  # another system, or a sandbox
            maps = MAPS.read_bytes()
        fields = [line.split(maxsplit=5) for line in os.fsdecode(maps).split("\n")]
        mapped = [each[0].split("-") for each in fields if len(each) == 6 and each[5] in names]
        self.ranges = sorted((int(start, 16), int(end, 16)) for start, end in mapped)
        self.madvise = libc_function("madvise") if self.ranges else None

    def return_pages(self, tensor: Tensor) -> None:
        """Return the pages of a tensor that was not written to; a later use reads them from the file again."""
        start, size = tensor.data_ptr(), mapped_bytes(tensor).numel()
        i = bisect_right(self.ranges, (start, start)) - 1
        if self.madvise and i >= 0 and start + size <= self.ranges[i][1]:
            page = start - start % mmap.PAGESIZE
            self.madvise(ctypes.c_void_p(page), ctypes.c_size_t(start + size - page), mmap.MADV_DONTNEED)
