"""Copies of memory-mapped tensors, made so that a file that is cut short meanwhile is an error.

A process that reads mapped memory beyond the end of the file is killed (SIGBUS). A system call that reads it fails with
EFAULT instead, so the kernel makes the copy, through a pipe. To read the files without mapping them would need the
position of each tensor, which `torch.load` does not return, or the memory of a whole file.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic.folder import UNCHANGED
from ..errors import CheckpointError, invalid

PIPE_CHUNK = 2**16  # bytes, the usual capacity of a pipe


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
