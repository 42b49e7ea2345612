"""Inspection of checkpoints in any known layout: their parts, each complete and built without copying weights."""

from __future__ import annotations

import glob
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ..atomic.folder import REPLACEABLE, UNCHANGED, FileStamp, stamps
from ..errors import CheckpointError, InputError, invalid, short_repr
from ..weights.configured import configured_from_single
from ..weights.filenames import DIFFUSERS, TRANSFORMERS
from ..weights.infer_config import infer_config, uninferable_warning
from ..weights.json_files import read_json, safe_join
from ..weights.keymap import PUBLISHED, Keymap, Source
from ..weights.mapped import copy_mapped, mapped_bytes
from ..weights.model_index import INDEX, PARTS, class_named, default_class
from ..weights.pretrained import PretrainedModel
from ..weights.published_config import has_legacy_sample_size
from ..weights.read_errors import explain_read_error, kind_of
from ..weights.reading import read_weights
from ..weights.single_file import EMA, RAW, PartTensors, SingleFile, detect_part


@dataclass(frozen=True)
class InspectedPart:
    """A part of a checkpoint: a component with the weights of the file, and a description of these for the report.

    `source` has the tensors under their names in the file; it is None for a part without weights.
    """

    component: Any
    description: str
    source: PartTensors | None = None
    checksums: dict[str, int] = field(default_factory=dict)  # by name in the file

    @cached_property
    def keymap(self) -> Keymap:
        """The translation between the model's tensor names and those in files."""
        return self.component.keymap

    @cached_property
    def locations(self) -> dict[str, Source]:
        """By name of the model's tensors, where the file stores them."""
        assert self.source
        naming, stored = self.source.naming, self.source.tensors
        names = self.component.state_dict()
        return {name: source for name in names if (source := self.keymap.find_source(name, naming, stored))}

    def read_tensor(self, name: str) -> Tensor:
        """Return a copy of the model's tensor `name`, from the file.

        Raises `CheckpointError` if the file was cut short, or has other values than when this was called before.
        """
        assert self.source
        location = self.locations[name]
        tensor = copy_mapped(self.source.tensors[location.name], self.source.path, location.name)
        content: Any = mapped_bytes(tensor).numpy()
        checksum = zlib.crc32(content)
        if self.checksums.setdefault(location.name, checksum) != checksum:
            raise invalid(CheckpointError, self.source.path, UNCHANGED, "new values", key=location.name)
        return location.transform.load(tensor)

    @property
    def dropped(self) -> Counter[str]:
        """The tensors in the file that no model uses: by pattern of their names, how many."""
        if self.source is None:
            return Counter()
        patterns = (self.keymap.droppable_pattern(name, self.source.naming) for name in self.source.tensors)
        return Counter(pattern for pattern in patterns if pattern)

    @property
    def dtypes(self) -> Counter[str]:
        """The number of tensors of each dtype."""
        return Counter(str(tensor.dtype).removeprefix("torch.") for tensor in self.component.state_dict().values())


def checkpoint_stamps(paths: Iterable[Path]) -> dict[Path, FileStamp]:
    """Return the stamps of the files in these folders, and of these files, that an inspection reads."""
    out: dict[Path, FileStamp] = {}
    places = ("", *(f"{name}/" for name in PARTS))
    patterns = [f"{place}*{ending}" for place in places for ending in REPLACEABLE]
    for path in paths:
        with explain_read_error(path):
            is_folder = kind_of(path) == "folder"
            out |= stamps(path, patterns) if is_folder else stamps(path.parent, [glob.escape(path.name), "config.json"])
    return out


@dataclass(frozen=True)
class Inspection:
    """The parts of a checkpoint, `notes` on what else it contains, and the parts `missing` that its index lists."""

    source: Path
    layout: str
    parts: dict[str, InspectedPart]
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def inspect_checkpoint(
    source: str | Path, *, ema: str = "auto", config: Path | None = None, only: str | None = None
) -> Inspection:
    """Inspect a folder in diffusers' layout, the folder of one part, or a single file in any known dialect.

    `only`: inspect this part alone. `ema` and `config` are as in `from_single_file`. Raises `CheckpointError` for a
    source without a known part, and for an incomplete part, naming the tensor.
    """
    source = Path(source)
    kind = kind_of(source)
    if kind is None:
        raise invalid(CheckpointError, source, "a file or folder", "nothing at this path")
    with explain_read_error(source):
        if kind == "folder":
            inspection = inspect_folder(source, ema, config, only)
        else:
            inspection = inspect_file(SingleFile.read(source), ema, config, only)
    if not inspection.parts or (only and only not in inspection.parts):
        got = " and ".join(inspection.parts) or "none"
        raise invalid(CheckpointError, source, only or "a part of a checkpoint", got)
    return inspection


def inspect_file(file: SingleFile, ema: str, config: Path | None, only: str | None) -> Inspection:
    """Inspect a single file; `only` and the others are as in `inspect_checkpoint`."""
    if only is None:
        file.check_no_unknown()
    parts, notes = {}, []
    for part in file.parts if only is None else [only]:
        tensors = file.part_tensors(part, ema)
        model: Any = default_class(part).from_single(file, config, ema=ema, dtype=None, warn=notes.append)
        description = tensors.naming.dialect.value
        if part == "unet" and tensors.naming in (RAW, EMA):
            used, other = ("moving average (EMA)", "raw weights")[:: 1 if tensors.naming == EMA else -1]
            rest = f"{other} ignored" if len(file.parts[part]) > 1 else f"no {other.removesuffix(' (EMA)')}"
            description += f", {used} used, {rest}"
        parts[part] = InspectedPart(with_modern_sample_size(model), description, tensors)
    if "unet" in parts and not file.is_single_part and only is None:
        encoder = parts["image_encoder"].component if "image_encoder" in parts else None
        for part in ("scheduler", "feature_extractor"):
            component = configured_from_single(part, file, config, encoder)
            origin = "--config" if config else "this file" if part in file.configs else "the published checkpoint"
            parts[part] = InspectedPart(component, f"config from {origin}")
    if dropped := [name for name in file.tensors if file.is_droppable(name)]:
        notes.append(f"dropped: {len(dropped)} tensors of the noise schedule and of the moving average's state")
    if file.ignored_entries:
        notes.append(f"ignored: {', '.join(file.ignored_entries)}")
    layout = "a single file with one part" if file.is_single_part else "a single file in the original layout"
    return Inspection(file.path, layout, parts, notes)


def inspect_folder(folder: Path, ema: str, config: Path | None, only: str | None) -> Inspection:
    """Inspect a folder in diffusers' layout, or that of one model."""
    if ema != "auto":
        raise invalid(InputError, "ema", "'auto' for a folder, which has one set of UNet weights", short_repr(ema))
    folders = [part for part in PARTS if kind_of(folder / part) == "folder"]
    if not folders:
        tensors = find_weights(folder)
        if tensors is None or not tensors.part:
            raise invalid(CheckpointError, folder, "folders of parts, such as unet/, or the weights of one", "neither")
        return Inspection(folder, "the folder of one part", {tensors.part: inspect_model(tensors, folder, config)})
    index = read_json(folder / INDEX) if kind_of(folder / INDEX) == "file" else {}
    disabled = [part for part in folders if index.get(part) == [None, None]]
    listed = {name for name, value in index.items() if isinstance(value, list)}
    unknown = sorted(listed.union(path.parent.name for path in folder.glob("*/*.json")) - PARTS.keys())
    notes = [f"ignored: {', '.join(disabled + unknown)}"] if disabled + unknown else []
    missing = [part for part in PARTS if part not in folders and index.get(part, [None, None]) != [None, None]]
    parts = {
        part: inspect_part(part, safe_join(folder, part), config, index.get(part))
        for part in folders
        if part not in disabled and only in (None, part)
    }
    return Inspection(folder, "a folder in diffusers' layout", parts, notes, missing)


def inspect_part(part: str, folder: Path, config: Path | None, index_value: Any) -> InspectedPart:
    """Inspect the folder of one part; `index_value` is the library and class that the index lists for it."""
    component_cls = default_class(part)
    if issubclass(component_cls, PretrainedModel):
        tensors = find_weights(folder)
        if tensors is None:
            raise invalid(CheckpointError, folder, "weights", "none")
        return inspect_model(replace(tensors, part=part), folder, config)
    path = config_path(component_cls, folder, config)
    settings = read_json(path)
    if part == "scheduler":
        is_listed = config is None and index_value and isinstance(index_value, list)
        component_cls = class_named(part, index_value[-1] if is_listed else settings.get("_class_name"), path)
    return InspectedPart(component_cls.build(component_cls.validate_config(settings, path), path), "config only")


def inspect_model(tensors: PartTensors, folder: Path, config: Path | None) -> InspectedPart:
    """Inspect a model in `folder`; without a config file it is inferred from `tensors`."""
    model_cls, naming, warning = default_class(tensors.part), tensors.naming, None
    path = config_path(model_cls, folder, config)
    if kind_of(path) == "file":
        settings = model_cls.read_config(path)
    else:
        path = tensors.path
        settings = model_cls.validate_config(infer_config(tensors), path)
        warning = uninferable_warning(tensors, settings)
    model = model_cls.from_tensors(tensors.tensors, settings, path, dtype=None, naming=naming, path=tensors.path)
    is_older = naming == PUBLISHED and not model.state_dict().keys() <= tensors.tensors.keys()
    description = f"{naming.dialect.value}{' of 2022' if is_older else ''}, from {tensors.path.name}"
    description += f"; {warning}" if warning else ""
    return InspectedPart(with_modern_sample_size(model), description, tensors)


def config_path(component_cls: Any, folder: Path, config: Path | None) -> Path:
    """Return the config file of a component in `folder`, or in the folder `config` if that is given."""
    return safe_join(folder, component_cls.config_name) if config is None else component_cls.find_config(config)


def find_weights(folder: Path) -> PartTensors | None:
    """Return the weights in a part's folder: safetensors before pickles, plain files before variants; None without any.

    `part` is "" if the tensors are of no known part.
    """
    names = [path.name for path in folder.iterdir()]
    for weights_name in (DIFFUSERS, TRANSFORMERS):
        for variant in weights_name.variants(names)[:1]:
            path, tensors = read_weights(folder, weights_name, variant, None)
            part, naming = detect_part(tensors) or ("", PUBLISHED)
            return PartTensors(part, naming, tensors, path)
    return None


def with_modern_sample_size(model: Any) -> Any:
    """Return the model with the sample_size that pipelines use: the output does not have the version of the source."""
    if model.part == "unet" and has_legacy_sample_size(model.config):
        model.register_to_config(sample_size=64)
    return model
