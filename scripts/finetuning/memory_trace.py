"""How much memory a function allocates, operation by operation, measured on tensors without data.

The tensors are those of PyTorch's FakeTensorMode on the CPU, so that neither a GPU nor memory is needed. They are
allocated as on a GPU with one exception, for which there is `autocast_as_on_cuda`: autocast on CUDA computes the norms
and the upsampling in float32, and saves tensors of four bytes for them, where autocast on a CPU keeps the dtype.
Attention saves q, k, v, the output and a logarithm for each query on both devices, as flash attention does. Memory
within an operation, such as the workspace of a convolution, is not measured.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.library import _scoped_library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

HALF = torch.float16, torch.bfloat16
FLOAT32_ON_CUDA = "layer_norm", "group_norm", "upsample_nearest2d"
"""The operations of the UNet that autocast computes in float32 on CUDA and not on a CPU."""


@contextmanager
def autocast_as_on_cuda() -> Iterator[None]:
    """Let autocast on the CPU, in the whole process, compute in float32 what autocast on CUDA does."""
    with _scoped_library("aten", "IMPL") as library:
        for name in FLOAT32_ON_CUDA:
            library.impl(name, in_float32(getattr(torch.ops.aten, name).default), "AutocastCPU")
        yield


def in_float32(operation: Any) -> Callable[..., Tensor]:
    """Return an operation that casts its tensors to float32 first."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = tree_map(to_float32, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return operation(*args, **kwargs)

    return run


def to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


class AllocationTrace(TorchDispatchMode):
    """Records which storages operations allocate and when they are freed; time counts allocations.

    Storages that existed before are not recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.time = 0
        self.sizes: list[int] = []  # bytes, of each storage that was allocated
        self.starts: list[int] = []
        self.ends: dict[int, int] = {}  # by index in the lists; none for a storage that is not freed
        self.indices: dict[int, int | None] = {}  # of living storages by id; None for one that existed before
        self.references: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled, and skipping takes a third of the time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # attributes of tensors
            return func(*args, **(kwargs or {}))
        self.add((*args, *(kwargs or {}).values()), existed=True)
        output = func(*args, **(kwargs or {}))
        self.add((output,), existed=False)
        return output

    def tick(self) -> int:
        """Let a unit of time pass in which nothing is allocated, and return it."""
        self.time += 1
        return self.time

    def add(self, values: Iterable[Any], existed: bool) -> None:
        """Record the storages of tensors, and of those in lists of tensors."""
        for value in values:
            if isinstance(value, (list, tuple)):
                self.add(value, existed)
            elif isinstance(value, Tensor) and id(storage := value.untyped_storage()) not in self.indices:
                key = id(storage)
                self.indices[key] = None if existed else len(self.sizes)
                self.references[key] = weakref.ref(storage, lambda _, key=key: self.free(key))
                if not existed:
                    self.time += 1
                    self.sizes.append(storage.nbytes())
                    self.starts.append(self.time)

    def free(self, key: int) -> None:
        index = self.indices.pop(key)
        del self.references[key]
        if index is not None:
            self.ends[index] = self.time + 1

    def live_bytes(self, only: Iterable[Tensor] | None = None) -> NDArray[np.int64]:
        """Return the bytes that are allocated after each allocation: all, or those of some tensors."""
        indices: Iterable[int] = range(len(self.sizes))
        if only is not None:
            found = {self.indices.get(id(tensor.untyped_storage())) for tensor in only}
            indices = [index for index in found if index is not None]
        changes = np.zeros(self.time + 2, np.int64)
        for index in indices:
            changes[self.starts[index]] += self.sizes[index]
            changes[self.ends.get(index, self.time + 1)] -= self.sizes[index]
        return changes.cumsum()[:-1]


@dataclass(frozen=True)
class Footprint:
    """The memory of a function of a batch: after each allocation, `constant` bytes and `per_sample` for each sample.

    `gradients` are bytes of the gradients of parameters, which the former do not contain; `forward_end` is when the
    forward pass ends.
    """

    constant: NDArray[np.int64]
    per_sample: NDArray[np.int64]
    gradients: NDArray[np.int64]
    forward_end: int = 0

    def peak(self, batch: int, split: int = 1) -> tuple[int, int]:
        """Return the bytes of activations and temporary tensors, and of gradients, when their sum is the greatest.

        The gradients are split over `split` ranks.
        """
        others, gradients = self.constant + batch * self.per_sample, -(-self.gradients // split)
        when = int((others + gradients).argmax())
        return int(others[when]), int(gradients[when])

    def saved(self, batch: int) -> int:
        """Return the bytes at the end of the forward pass: what is saved for the backward pass."""
        return int(self.constant[self.forward_end] + batch * self.per_sample[self.forward_end])


@dataclass
class Measurement:
    """The trace of one call, with the gradients that it left."""

    trace: AllocationTrace
    forward_end: int
    gradients: list[Tensor]


def footprint(measure: Callable[[int], Measurement]) -> Footprint:
    """Return the footprint of what `measure` runs with a batch of a given size.

    The same operations run for every batch, and the size of each tensor is linear in the size of the batch, so two
    batches determine all.
    """
    live, gradients = {}, {}
    for batch in (2, 3):
        measured = measure(batch)
        gradients[batch] = measured.trace.live_bytes(measured.gradients)
        live[batch] = measured.trace.live_bytes() - gradients[batch]
        forward_end = measured.forward_end
        del measured
    if len(live[2]) != len(live[3]) or (gradients[2] != gradients[3]).any():
        raise RuntimeError(
            f"batch: expected the same allocations for 2 and 3 samples, got {len(live[2])} and {len(live[3])}"
        )
    per_sample = live[3] - live[2]
    return Footprint(live[2] - 2 * per_sample, per_sample, gradients[2], forward_end)
