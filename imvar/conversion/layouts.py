"""The layouts that a checkpoint is converted to, with the checks before and after writing."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from ..atomic.file import atomic_file, write_text
from ..atomic.folder import ReadFiles, atomic_folder, matching
from ..errors import CheckpointError, InputError, invalid, warn_user
from ..weights.configured import ConfiguredComponent
from ..weights.keymap import PUBLISHED, Naming
from ..weights.model_index import INDEX, PARTS, index_text
from ..weights.read_errors import explain_read_error, kind_of
from ..weights.reading import read_checkpoint, read_weights
from ..weights.single_file import CONFIGS_KEY, ORIGINAL_NAMINGS
from ..weights.writing import OnBytes, WrittenFile, value_range, write_tensors, write_weights
from .inspect import InspectedPart

DTYPES = {"keep": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PIPELINE_CLASS = "StableDiffusionImageVariationPipeline"
REQUIRED_PARTS = {"unet", "vae", "image_encoder"}  # of a pipeline; a folder without them has no index


class Layout(ABC):
    """A checkpoint to write: a path, the parts, and a dtype for all floating-point tensors, or None to keep each."""

    description: str

    def __init__(self, path: Path, parts: Mapping[str, InspectedPart], dtype: torch.dtype | None, max_shard_size: int):
        self.path, self.dtype, self.max_shard_size = path, dtype, max_shard_size
        self.parts = {name: part for name, part in parts.items() if self.accepts(part)}
        if not self.parts:
            expected = f"a layout with a place for the {' and the '.join(parts)}"
            raise invalid(InputError, "to", expected, self.description)

    @staticmethod
    @abstractmethod
    def check_path(path: Path) -> None:
        """Raise `InputError` for a path that is not possible in this layout."""

    def accepts(self, part: InspectedPart) -> bool:
        """Return whether the layout has a place for this part."""
        return True

    @property
    @abstractmethod
    def existing(self) -> str:
        """A text about what exists at the target and will be replaced; empty for nothing."""

    @property
    @abstractmethod
    def left_out(self) -> dict[str, str]:
        """The parts that are not written, and the reason."""

    def naming(self, part: str) -> Naming:
        """Return the naming of a part's tensors."""
        return PUBLISHED

    @abstractmethod
    def write_parts(self, on_bytes: OnBytes, verify: bool, files: ReadFiles) -> list[WrittenFile]:
        """Write the checkpoint atomically; with `verify`, read it back before it replaces the target.

        Raises `CheckpointError` if the source `files` have changed; the target is unchanged then.
        """

    @abstractmethod
    def read_back(self, part: str, path: Path) -> Mapping[str, Tensor]:
        """Return the tensors of a part that was written to the temporary `path`."""

    @cached_property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """By part, the tensors to write under their new names, on the meta device."""
        tensors = {}
        for name, part in self.parts.items():
            if part.source:
                state = {key: tensor.to("meta") for key, tensor in part.component.state_dict().items()}
                tensors[name] = self.to_target_dtype(part.keymap.to_file(state, self.naming(name)))
        return tensors

    @cached_property
    def members(self) -> dict[str, dict[str, list[str]]]:
        """By part and new name, the names of the model's tensors that are stored in one."""
        members: dict[str, dict[str, list[str]]] = {part: defaultdict(list) for part in self.tensors}
        for part, by_name in members.items():
            for name in self.parts[part].locations:
                by_name[self.parts[part].keymap.sources(name, self.naming(part))[0].name].append(name)
        return members

    def read_values(self, part: str, name: str) -> Tensor:
        """Return a tensor to write by its new name. Raises as `InspectedPart.read_tensor` does."""
        inspected = self.parts[part]
        tensors = {member: inspected.read_tensor(member) for member in self.members[part][name]}
        return self.to_target_dtype(inspected.keymap.to_file(tensors, self.naming(part)))[name]

    def to_target_dtype(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors in the dtype to write."""
        return {name: tensor.to(self.dtype or tensor.dtype) for name, tensor in tensors.items()}

    @property
    def total_bytes(self) -> int:
        """The size of all tensors to write."""
        return sum(tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values())

    def check_target(self) -> None:
        """Raise `CheckpointError` if the target has a part of another checkpoint that would stay among the new ones."""
        others = [self.path / name for name in PARTS if name not in self.parts]
        old = [path for path in others if kind_of(path) == "folder"]
        if old and len(self.parts) > 1:
            expected, got = "no part of another checkpoint among the new ones", "one that would not be replaced"
            hint = "choose another target, or pass fill= (--fill)"
            raise invalid(CheckpointError, old[0], expected, got, hint)

    def check_dtypes(self) -> None:
        """Raise `CheckpointError` for tensors of several dtypes that would all get the widest, stored as one tensor."""
        if self.dtype is not None:
            return
        for part, by_name in self.members.items():
            tensors, source = self.parts[part].component.state_dict(), self.parts[part].source
            for members in by_name.values():
                dtypes = [str(tensors[member].dtype).removeprefix("torch.") for member in members]
                if source and len(set(dtypes)) > 1:
                    expected = f"one dtype for {', '.join(members)}, which are one tensor in {self.description}"
                    hint = "pass dtype= (--dtype)"
                    raise invalid(CheckpointError, source.path, expected, ", ".join(dtypes), hint, key=members[0])

    @property
    def kept_weights(self) -> list[Path]:
        """Weights in a target folder that are neither replaced nor part of the new checkpoint, such as variants."""
        with explain_read_error(self.path):
            return [
                path
                for name, part in self.parts.items()
                if part.source
                for path in sorted(matching(self.path / name, ["*"]))
                if part.component.weights_name.is_preserved(path.name)
            ]

    def check_space(self) -> None:
        """Raise `CheckpointError` if the disk is too full."""
        existing = next(path for path in (self.path, *self.path.absolute().parents) if kind_of(path))
        free = shutil.disk_usage(existing).free
        if self.total_bytes > free:
            expected, got = f"{self.total_bytes} bytes of free disk space", f"{free} bytes"
            raise invalid(CheckpointError, self.path, expected, got, "nothing was written")

    def check_values(self, on_bytes: OnBytes) -> None:
        """Raise for a tensor with NaN or infinite values, or with values beyond the new dtype.

        Warns about tensors whose values are all too small for it.
        """
        zeroed: dict[str, None] = {}
        for part, source in ((part, part.source) for part in self.parts.values() if part.source):
            for name, location in part.locations.items():
                tensor, key = part.read_tensor(name), location.name
                low, high = value_range(tensor)
                largest = max(-low, high)
                if not isfinite(low) or not isfinite(high):
                    raise invalid(CheckpointError, source.path, "finite values", "NaN or infinity", key=key)
                if self.dtype and largest > torch.finfo(self.dtype).max:
                    fitting = [name for name in ("bf16", "fp32") if largest <= torch.finfo(DTYPES[name]).max]
                    got = f"{self.dtype}, which cannot hold {largest:g} of {key} in {source.path}"
                    raise invalid(InputError, "dtype", " or ".join(fitting or ["keep"]), got)
                value = torch.tensor(largest, dtype=torch.float64, device="cpu")
                if self.dtype and largest and value.to(self.dtype) == 0:
                    zeroed[f"{key} of {source.path}"] = None
                on_bytes(tensor.numel() * (self.dtype or tensor.dtype).itemsize)
        if zeroed:
            first, *others = zeroed
            first += f" and {len(others)} more" if others else ""
            hint = "use torch.bfloat16 or torch.float32"
            warn_user(f"{first}: all values are too small for {self.dtype} and become zero; {hint}")

    def verify(self, path: Path, on_bytes: OnBytes) -> None:
        """Read back the temporary `path`. Raises `CheckpointError` naming a tensor that differs in a bit."""
        for part, tensors in self.tensors.items():
            written = self.read_back(part, path)
            for name in tensors:
                tensor = self.read_values(part, name)
                if name not in written or not is_identical(written[name], tensor):
                    expected, got = "the values that were written", "others when reading back"
                    raise invalid(CheckpointError, self.path, expected, got, "the new files were removed", key=name)
                on_bytes(tensor.nbytes)


class DiffusersLayout(Layout):
    """A folder with a config and safetensors for each part, and an index if the parts make a pipeline."""

    description = "a folder in diffusers' layout"

    @staticmethod
    def check_path(path: Path) -> None:
        if path.suffix.lower() in (".safetensors", ".ckpt", ".bin", ".pt") or kind_of(path) == "file":
            hint = "to='original' (--to original) writes one file"
            raise invalid(InputError, "target", "a folder", f"a file, {str(path)!r}", hint)

    @property
    def existing(self) -> str:
        with explain_read_error(self.path):
            parts = [name for name in self.parts if kind_of(self.path / name) == "folder"]
        return f"{', '.join(parts)} in the existing {self.path}; its other files stay" if parts else ""

    @property
    def left_out(self) -> dict[str, str]:
        reason = "not in the source; fill= (--fill) takes it from another checkpoint"
        return {name: reason for name in PARTS if name not in self.parts and len(self.parts) > 1}

    def write_parts(self, on_bytes: OnBytes, verify: bool, files: ReadFiles) -> list[WrittenFile]:
        written = []
        with atomic_folder(self.path) as new:
            for name, part in self.parts.items():
                ConfiguredComponent.save_pretrained(part.component, new / name)
                if part.source:
                    weights = write_weights(
                        new / name,
                        part.component.weights_name,
                        self.tensors[name],
                        read=partial(self.read_values, name),
                        max_shard_size=self.max_shard_size,
                        on_bytes=on_bytes,
                        digest=True,
                    )
                    written += [replace(file, path=self.path / name / file.path.name) for file in weights]
            if self.parts.keys() >= REQUIRED_PARTS:
                components = {name: self.parts[name].component if name in self.parts else None for name in PARTS}
                settings = {"requires_safety_checker": "safety_checker" in self.parts}
                write_text(new / INDEX, index_text(PIPELINE_CLASS, components, settings))
            if verify:
                self.verify(new, on_bytes)
            files.check()
        return written

    def read_back(self, part: str, path: Path) -> Mapping[str, Tensor]:
        return read_weights(path / part, self.parts[part].component.weights_name, None, True)[1]


class OriginalLayout(Layout):
    """One safetensors file with original names, those of raw weights for the UNet, and the configs in its metadata."""

    description = "a single file in the original layout"

    @staticmethod
    def check_path(path: Path) -> None:
        if path.suffix != ".safetensors" or kind_of(path) == "folder":
            raise invalid(InputError, "target", "a .safetensors file for to='original'", repr(str(path)))

    def accepts(self, part: InspectedPart) -> bool:
        return part.component.part in ORIGINAL_NAMINGS or part.source is None

    @property
    def existing(self) -> str:
        return f"the existing file {self.path}" if kind_of(self.path) == "file" else ""

    @property
    def left_out(self) -> dict[str, str]:
        return {"safety_checker": "the original layout has no place for it"}

    def naming(self, part: str) -> Naming:
        return ORIGINAL_NAMINGS[part][0]

    def write_parts(self, on_bytes: OnBytes, verify: bool, files: ReadFiles) -> list[WrittenFile]:
        tensors = {name: tensor for part in self.tensors.values() for name, tensor in part.items()}
        parts = {name: part for part, names in self.tensors.items() for name in names}
        configs = {name: part.component.saved_config() for name, part in self.parts.items()}
        metadata = {CONFIGS_KEY: json.dumps(configs, sort_keys=True)}
        with atomic_file(self.path) as new:
            written = write_tensors(
                new,
                tensors,
                read=lambda name: self.read_values(parts[name], name),
                on_bytes=on_bytes,
                digest=True,
                metadata=metadata,
            )
            if verify:
                self.verify(new, on_bytes)
            files.check()
        return [replace(written, path=self.path)]

    def read_back(self, part: str, path: Path) -> Mapping[str, Tensor]:
        return read_checkpoint(path)[0]


def is_identical(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal in shape, dtype and every bit."""
    bits = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
