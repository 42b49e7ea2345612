"""Where the weights of a model come from, and whether they are still as they were loaded."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .bundled import HOME
from .read_errors import explain_read_error

HUB_FOLDER = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})(?=/)")
SHA256 = re.compile(r"[0-9a-f]{64}")


class WeightsFile(NamedTuple):
    """A file of weights: its name within the checkpoint, and its path, size and time of change when it was read."""

    name: str
    path: str  # which can be unpickled on another system
    size: int
    mtime_ns: int

    @classmethod
    def stamped(cls, name: str, path: str | Path) -> WeightsFile:
        """Return the file of a path as it is now."""
        with explain_read_error(Path(path)):
            status = os.stat(path)
        return cls(name, str(path), status.st_size, status.st_mtime_ns)

    def is_same_file(self) -> bool:
        """Return whether the file is still the one that was read, by size and time."""
        try:
            return self.stamped(self.name, self.path) == self
        except OSError:
            return False

    def digest_in_name(self) -> str | None:
        """Return the SHA-256 digest that the hub's cache has as the name of a large file; None for other files."""
        blob = Path(os.path.realpath(self.path))
        return blob.name if blob.parent.name == "blobs" and SHA256.fullmatch(blob.name) else None


@dataclass(frozen=True)
class Origin:
    """Where the weights of a model come from.

    `name` of the checkpoint: its hub id, or the last component of its path; `revision`, as it was asked for, and the
    `commit` on the hub; `ema`, whether they are a moving average, if the file has both that and raw weights. `dtypes`:
    of the files, and the narrowest that the values were rounded to. `state` of the weights as they were loaded.
    """

    name: str
    files: tuple[WeightsFile, ...]
    dtypes: tuple[torch.dtype, torch.dtype | None]
    revision: str | None = None
    commit: str | None = None
    ema: bool | None = None
    state: float | None = None

    def has_state_of(self, layers: Sequence[nn.Module]) -> bool:
        """Return whether no layer or weight was replaced, and no weight written to where autograd counts it."""
        return self.state == state_of(layers)

    def is_of(self, layers: Sequence[nn.Module]) -> bool:
        """Return whether the layers of a model have the weights of the files, rounded to their dtype."""
        stored, rounded = self.dtypes
        return self.has_state_of(layers) and (rounded == stored or dtypes_of(layers) == {rounded})

    def moved(self, layers: Sequence[nn.Module]) -> Origin:
        """Return this with the present state of the weights, after they were moved, cast or copied."""
        stored, rounded = self.dtypes
        for dtype in dtypes_of(layers):
            if rounded == stored:
                rounded = stored if holds(dtype, stored) else dtype
            elif rounded is not None and not holds(dtype, rounded):
                rounded = dtype if holds(rounded, dtype) else None  # else rounded twice
        return replace(self, dtypes=(stored, rounded), state=state_of(layers))


def origin_of(
    model: Any, path: Path, files: Iterable[WeightsFile], stored: torch.dtype, ema: bool | None = None
) -> Origin:
    """Return the origin of a model that was just loaded from the folder of its part, or from a file.

    `stored`: the dtype that holds the values of the files.
    """
    absolute = Path(os.path.abspath(path))
    snapshot = HUB_FOLDER.search(f"{absolute.as_posix()}/")
    if snapshot:
        name = snapshot[1].replace("--", "/")
    elif absolute.is_relative_to(HOME):
        name = absolute.relative_to(HOME).parts[0]
    else:
        name = absolute.parent.name if absolute.name == model.part else absolute.name
    commit = snapshot[2] if snapshot else None
    return Origin(name, tuple(files), (stored, stored), commit=commit, ema=ema).moved(layers_of(model))


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return a model and all modules in it, as `model.modules()` does, in half the time."""
    layers: list[nn.Module] = []
    seen: set[nn.Module] = set()
    stack = [model]
    while stack:
        layer = stack.pop()
        if layer not in seen:
            seen.add(layer)
            layers.append(layer)
            stack += [child for child in reversed(layer._modules.values()) if child is not None]
    return layers


def tensors_of(layers: Sequence[nn.Module]) -> Iterator[Tensor]:
    """Yield the parameters and buffers of layers, repeated where they are shared."""
    for layer in layers:
        for tensor in (*layer._parameters.values(), *layer._buffers.values()):
            if tensor is not None:
                yield tensor


def dtypes_of(layers: Sequence[nn.Module]) -> set[torch.dtype]:
    """Return the floating-point dtypes of the weights."""
    return {dtype for dtype in {tensor.dtype for tensor in tensors_of(layers)} if dtype.is_floating_point}


SWITCHES = {"slice_size"}  # of layers, which records have as settings


def state_of(layers: Sequence[nn.Module]) -> float:
    """Return a number that changes with layers, their settings and weights: replaced, moved or written to in place.

    It is NaN, which equals nothing, for tensors without memory of their own, such as fake and sparse ones.
    """
    kinds = [id(getattr(type(layer), "in_place_of", type(layer))) for layer in layers]
    settings = [item for layer in layers for item in vars(layer).items() if is_setting(*item)]
    try:
        weights = [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors_of(layers)]
    except RuntimeError:
        return math.nan
    return hash((*kinds, *map(repr, settings), *weights))


def is_setting(name: str, value: Any) -> bool:
    """Return whether an attribute of a layer is a constant that it computes with, such as its padding."""
    return type(value) in (int, float, str, tuple) and name[0] != "_" and name not in SWITCHES


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Return whether one dtype represents all values of another."""
    if wide == narrow or 1 in (wide.itemsize, narrow.itemsize):  # 8-bit floats, which PyTorch does not promote
        return wide == narrow or narrow.itemsize < wide.itemsize
    return torch.promote_types(wide, narrow) == wide
