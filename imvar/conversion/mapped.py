"""Copies of memory-mapped tensors, made so that a file that is cut short meanwhile is an error.

A process that reads mapped memory beyond the end of the file is killed (SIGBUS). A system call that reads it fails with
EFAULT instead, so the kernel makes the copy, through a pipe. To read the files without mapping them would need the
position of each tensor, which `torch.load` does not return, or the memory of a whole file.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

PIPE_CHUNK = 2**16  # bytes, the usual capacity of a pipe


def mapped_bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor as bytes, from its first to its last element, without a copy."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((steps + 1 if tensor.numel() else 0,), (1,)).view(torch.uint8)


def copy_mapped(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor with the same strides. Raises `OSError` if the file it is mapped from was cut short."""
    source = mapped_bytes(tensor)
    if os.name != "posix":  # Windows refuses to cut mapped files
        copy = source.clone()
    else:
        copy = torch.empty_like(source)
        copy_through_pipe(source.numpy(), copy.numpy())
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
