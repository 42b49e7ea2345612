"""The layouts that a checkpoint is converted to, and what is checked before and after one is written."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic.file import atomic_file, write_text
from ..atomic.folder import atomic_folder
from ..errors import CheckpointError, InputError
from ..weights.configured import ConfiguredComponent
from ..weights.keymap import PUBLISHED, Naming
from ..weights.model_index import INDEX, PARTS, index_text
from ..weights.reading import read_checkpoint, read_weights
from ..weights.single_file import CONFIGS_KEY, ORIGINAL_NAMINGS
from ..weights.writing import WrittenFile, write_tensors, write_weights
from .inspect import InspectedPart

PIPELINE = "StableDiffusionImageVariationPipeline"
WHOLE = {"unet", "vae", "image_encoder"}  # without these there is no pipeline, and so no index of its parts

WIDER = {"bf16": torch.bfloat16, "fp32": torch.float32}

OnBytes = Callable[[int], Any]


class Layout(ABC):
    """A checkpoint to be written: where, with which parts, and as which dtype (None: as each tensor is)."""

    kind: str

    def __init__(self, path: Path, parts: Mapping[str, InspectedPart], dtype: torch.dtype | None, max_shard_size: int):
        self.path, self.dtype, self.max_shard_size = path, dtype, max_shard_size
        self.parts = {name: found for name, found in parts.items() if self.takes(found)}
        if not self.parts:
            raise InputError(f"to: {self.kind} has no place for the {' and the '.join(parts)}")

    @staticmethod
    @abstractmethod
    def check_path(path: Path) -> None:
        """Raise `InputError` for a path that cannot be of this layout."""

    @abstractmethod
    def takes(self, found: InspectedPart) -> bool:
        """Whether the layout has a place for this part."""

    @property
    @abstractmethod
    def left_out(self) -> dict[str, str]:
        """The parts that the target goes without, and why."""

    @abstractmethod
    def naming(self, part: str) -> Naming:
        """What tensors of the part are called."""

    @abstractmethod
    def write(self, on_bytes: OnBytes, verify: bool) -> list[WrittenFile]:
        """Write it whole or not at all; to `verify`, read it back before it takes its place."""

    @abstractmethod
    def read(self, part: str, place: Path) -> Mapping[str, Tensor]:
        """What was written of the part, and is still at `place`."""

    @cached_property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """By part, what is to be written under which name, not yet cast."""
        return {
            name: found.keymap.to_theirs(found.value.state_dict(), self.naming(name))
            for name, found in self.parts.items()
            if found.has_weights
        }

    @property
    def bytes(self) -> int:
        """What the weights will take."""
        return sum(self.written_bytes(tensor) for tensors in self.tensors.values() for tensor in tensors.values())

    def written_bytes(self, tensor: Tensor) -> int:
        return tensor.numel() * (self.dtype or tensor.dtype).itemsize

    def check_leftovers(self) -> None:  # noqa: B027
        """Raise `CheckpointError` for a part of another checkpoint at the target that this one would stand beside."""

    @property
    def beside(self) -> list[Path]:
        """Files of weights at the target that the new ones neither replace nor go with."""
        return []

    def check_space(self) -> None:
        """Raise `CheckpointError` if the disk has no room for it."""
        there = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        free = shutil.disk_usage(there).free
        if self.bytes > free:
            raise CheckpointError(
                f"needs {self.bytes} bytes, and {free} are free on that disk; nothing was written", path=self.path
            )

    def check_values(self, on_bytes: OnBytes) -> None:
        """Raise for a tensor with NaN or infinite values, or with values that the new dtype cannot hold."""
        for found in (part for part in self.parts.values() if part.has_weights):
            for name, tensor in found.value.state_dict().items():
                wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # few functions take 8 bits
                low, high = (bound.item() for bound in wide.aminmax()) if tensor.numel() else (0.0, 0.0)
                if not isfinite(low) or not isfinite(high):
                    raise CheckpointError("has NaN or infinite values", path=found.path, key=found.name(name))
                if self.dtype and (most := max(-low, high)) > torch.finfo(self.dtype).max:
                    wide = [name for name, dtype in WIDER.items() if most <= torch.finfo(dtype).max] or ["keep"]
                    raise InputError(
                        f"dtype: {found.name(name)} of {found.path} goes up to {most:g}, beyond "
                        f"{self.dtype}; {' or '.join(wide)} would do"
                    )
                on_bytes(self.written_bytes(tensor))

    def verify(self, place: Path, on_bytes: OnBytes) -> None:
        """Read back what was written. Raises `CheckpointError` naming a tensor that differs in a bit."""
        for part, tensors in self.tensors.items():
            there = self.read(part, place)
            for name, tensor in tensors.items():
                if name not in there or not same(there[name], tensor.to(self.dtype or tensor.dtype)):
                    raise CheckpointError(
                        "does not read back as it was written, so it was removed", path=self.path, key=name
                    )
                on_bytes(self.written_bytes(tensor))


class DiffusersLayout(Layout):
    """A folder in diffusers' layout: settings and safetensors for each part, and an index if they make a pipeline."""

    kind = "a folder in diffusers' layout"

    @staticmethod
    def check_path(path: Path) -> None:
        if path.suffix in (".safetensors", ".ckpt", ".bin", ".pt") or path.is_file():
            raise InputError(
                f"target={str(path)!r}: diffusers' layout is a folder, and this is a file or named "
                "like one; to='original' writes one file"
            )

    def takes(self, found: InspectedPart) -> bool:
        return True

    @property
    def left_out(self) -> dict[str, str]:
        why = "the source has none; fill= (--fill) can take it from another checkpoint"
        return {name: why for name in PARTS if name not in self.parts and len(self.parts) > 1}

    def naming(self, part: str) -> Naming:
        return PUBLISHED

    def check_leftovers(self) -> None:
        old = [self.path / name for name in PARTS if name not in self.parts and (self.path / name).is_dir()]
        if old and len(self.parts) > 1:
            raise CheckpointError(
                "is there from another checkpoint, and there is none to replace it: it would stand "
                "beside the new parts as if it were theirs. Another target, or fill= (--fill), would "
                "do",
                path=old[0],
            )

    @property
    def beside(self) -> list[Path]:
        return [
            path
            for name, found in self.parts.items()
            if found.has_weights
            for path in sorted((self.path / name).glob("*"))
            if found.value.stem.left(path.name)
        ]

    def write(self, on_bytes: OnBytes, verify: bool) -> list[WrittenFile]:
        written = []
        with atomic_folder(self.path) as new:
            for name, found in self.parts.items():
                ConfiguredComponent.save_pretrained(found.value, new / name)
                if found.has_weights:
                    files = write_weights(
                        new / name,
                        found.value.stem,
                        self.tensors[name],
                        dtype=self.dtype,
                        max_shard_size=self.max_shard_size,
                        on_bytes=on_bytes,
                        digest=True,
                    )
                    written += [replace(file, path=self.path / name / file.path.name) for file in files]
            if self.parts.keys() >= WHOLE:
                values = {name: self.parts[name].value if name in self.parts else None for name in PARTS}
                settings = {"requires_safety_checker": "safety_checker" in self.parts}
                write_text(new / INDEX, index_text(PIPELINE, values, settings))
            if verify:
                self.verify(new, on_bytes)
        return written

    def read(self, part: str, place: Path) -> Mapping[str, Tensor]:
        return read_weights(place / part, self.parts[part].value.stem, None, True)[1]


class OriginalLayout(Layout):
    """One safetensors file in the original layout, raw weights for the UNet; the settings are in its metadata."""

    kind = "one file in the original layout"

    @staticmethod
    def check_path(path: Path) -> None:
        if path.suffix != ".safetensors" or path.is_dir():
            raise InputError(
                f"target={str(path)!r}: the original layout is one file, and a name that ends in .safetensors would do"
            )

    def takes(self, found: InspectedPart) -> bool:
        return found.part in ORIGINAL_NAMINGS or not found.has_weights

    @property
    def left_out(self) -> dict[str, str]:
        return {"safety_checker": "the original layout has no place for it"}

    def naming(self, part: str) -> Naming:
        return ORIGINAL_NAMINGS[part][0]

    def write(self, on_bytes: OnBytes, verify: bool) -> list[WrittenFile]:
        tensors = {name: tensor for part in self.tensors.values() for name, tensor in part.items()}
        settings = json.dumps({name: found.value.saved_config() for name, found in self.parts.items()}, sort_keys=True)
        with atomic_file(self.path) as new:
            written = write_tensors(
                new, tensors, dtype=self.dtype, on_bytes=on_bytes, digest=True, metadata={CONFIGS_KEY: settings}
            )
            if verify:
                self.verify(new, on_bytes)
        return [replace(written, path=self.path)]

    def read(self, part: str, place: Path) -> Mapping[str, Tensor]:
        return read_checkpoint(place)[0]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to the bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
