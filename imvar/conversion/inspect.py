"""What a checkpoint of any kind holds: its parts, each found, understood and complete, with none of it copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError
from ..weights.configured import configured_from_single
from ..weights.filenames import DIFFUSERS, TRANSFORMERS
from ..weights.infer_config import infer_config, uninferable_warning
from ..weights.json_files import read_json, safe_join
from ..weights.keymap import PUBLISHED, Keymap, Naming
from ..weights.model_index import INDEX, PARTS, class_named, default_class
from ..weights.pretrained import PretrainedModel
from ..weights.published_config import has_legacy_sample_size
from ..weights.reading import read_weights
from ..weights.single_file import EMA, RAW, PartTensors, SingleFile, detect_part


@dataclass(frozen=True)
class InspectedPart:
    """A part of a checkpoint: an object of its class, with the weights as the file has them, and where it is from."""

    part: str
    value: Any
    path: Path
    how: str
    """In words: the dialect of the names, and which weights were taken where there was a choice."""
    held: PartTensors | None = None
    """What the file has of it; None for a part without weights."""

    @property
    def has_weights(self) -> bool:
        return isinstance(self.value, PretrainedModel)

    @cached_property
    def keymap(self) -> Keymap:
        return self.value.keymap

    @property
    def dropped(self) -> Mapping[str, int]:
        """The tensors beside the weights that no model has a use for: how many are called how."""
        if self.held is None:
            return {}
        return Counter(pattern for name in self.held.tensors if (pattern := self.keymap.drops(name, self.held.naming)))

    def name(self, ours: str) -> str:
        """What the file calls a tensor of ours."""
        if self.held is None:
            return ours
        sources = self.keymap.sources(ours, self.held.naming)
        return next((source.name for source in sources if source.name in self.held.tensors), ours)

    @property
    def dtypes(self) -> Counter[str]:
        """How many tensors there are of each dtype."""
        return Counter(str(tensor.dtype).removeprefix("torch.") for tensor in self.value.state_dict().values())


@dataclass(frozen=True)
class Inspection:
    """A checkpoint that was looked over.

    `notes` say, in words, what of it is left where it is; `lacking` are parts that its index names and it has not.
    """

    source: Path
    kind: str
    parts: dict[str, InspectedPart]
    notes: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)


def inspect_checkpoint(
    source: str | Path, *, ema: str = "auto", config: Path | None = None, only: str | None = None
) -> Inspection:
    """Look over a folder in diffusers' layout, the folder of one part, or a single file in any known dialect.

    `only`: the one part that is wanted. `ema` and `config` are as in `from_single_file`. Raises `CheckpointError` for
    a source that holds nothing known, and for a part that is not complete, naming the tensor.
    """
    source = Path(source)
    if source.is_dir():
        found = inspect_folder(source, ema, config, only)
    elif source.exists():
        found = inspect_file(SingleFile.read(source), ema, config, only)
    else:
        raise CheckpointError("no such file or folder", path=source)
    if not found.parts or (only and only not in found.parts):
        raise CheckpointError(f"holds no {only or 'part of a checkpoint'}", path=source)
    return found


def inspect_file(file: SingleFile, ema: str, config: Path | None, only: str | None) -> Inspection:
    wanted = list(file.parts) if only is None else [only]
    if only is None:
        file.check_known()
    parts, notes = {}, []
    for part in wanted:
        held = file.part(part, ema)
        model: Any = default_class(part).from_single(file, config, ema=ema, dtype=None, warn=notes.append)
        how = held.naming.dialect.value
        if part == "unet":
            how += describe_ema_choice(held.naming, file)
        parts[part] = InspectedPart(part, with_modern_sample_size(model), file.path, how, held)
    if "unet" in parts and not file.is_single_part and only is None:
        for part in ("scheduler", "feature_extractor"):
            encoder = parts["image_encoder"].value if "image_encoder" in parts else None
            value = configured_from_single(part, file, config, encoder)
            where = "--config" if config else "this file" if part in file.settings else "the published settings"
            parts[part] = InspectedPart(part, value, file.path, f"from {where}")
    if tables := [name for name in file.tensors if file.is_droppable(name)]:
        notes.append(f"{len(tables)} tensors of the schedule and of the moving average's state are left out")
    if file.aside:
        notes.append(f"left where they are: {', '.join(file.aside)}")
    return Inspection(
        file.path, "one part alone" if file.is_single_part else "the original layout, one file", parts, notes
    )


def describe_ema_choice(naming: Naming, file: SingleFile) -> str:
    """Which of the UNet's weights were taken, and what was there."""
    there = {held.naming for held in file.parts["unet"]}
    if naming == EMA:
        return ", moving average (EMA) taken, " + ("raw weights left" if RAW in there else "there are no raw weights")
    if naming == RAW:
        return ", raw weights taken, " + ("moving average (EMA) left" if EMA in there else "there is no moving average")
    return ""


def inspect_folder(folder: Path, ema: str, config: Path | None, only: str | None) -> Inspection:
    if ema != "auto":
        raise InputError(
            f"ema={ema!r}: a folder has one set of weights for the UNet, so there is nothing to choose; 'auto' would do"
        )
    there = [part for part in PARTS if (folder / part).is_dir()]
    if there:
        index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
        none = [part for part in there if index.get(part) == [None, None]]
        odd = sorted(
            {name for name, value in index.items() if isinstance(value, list)}.union(
                path.parent.name for path in folder.glob("*/*.json")
            )
            - PARTS.keys()
        )
        notes = [f"left where they are: {', '.join(none + odd)}"] if none + odd else []
        lacking = [part for part in PARTS if part not in there and index.get(part, [None, None]) != [None, None]]
        found = {
            part: inspect_part(part, safe_join(folder, part), config, index.get(part))
            for part in there
            if part not in none and only in (None, part)
        }
        return Inspection(folder, "a folder in diffusers' layout", found, notes, lacking)
    held = find_weights(folder)
    alone = detect_part(held.tensors) if held else None
    if alone is None:
        raise CheckpointError("holds neither parts of a checkpoint, such as unet/, nor the weights of one", path=folder)
    return Inspection(folder, "the folder of one part", {alone[0]: inspect_part(alone[0], folder, config)})


def inspect_part(part: str, folder: Path, config: Path | None, listed: Any = None) -> InspectedPart:
    """One part's folder: settings, and weights if its kind has any. `listed`: what the index says of it."""
    kind = default_class(part)
    path = safe_join(folder, kind.config_name) if config is None else kind.settings_file(config)
    if not issubclass(kind, PretrainedModel):
        settings = read_json(path)
        if part == "scheduler":
            name = listed[-1] if config is None and listed and isinstance(listed, list) else settings.get("_class_name")
            kind = class_named(part, name, path)
        return InspectedPart(part, kind.build(kind.validate_config(settings, path), path), path, "settings alone")
    held = find_weights(folder)
    if held is None:
        raise CheckpointError("holds no weights", path=folder)
    held = replace(held, part=part)
    told = path.is_file()
    weights = held.path or folder
    settings = kind.read_config(path) if told else kind.validate_config(infer_config(held), weights)
    guessed = None if told else uninferable_warning(held, settings)
    model = kind.from_tensors(
        held.tensors, settings, path if told else weights, dtype=None, naming=held.naming, path=weights
    )
    found = InspectedPart(part, with_modern_sample_size(model), weights, held.naming.dialect.value, held)
    current = {found.keymap.spelled(name) for name in model.state_dict()}
    older = " of 2022" if held.naming == PUBLISHED and not current <= held.tensors.keys() else ""
    return replace(found, how=f"{found.how}{older}, from {weights.name}{f'; {guessed}' if guessed else ''}")


def find_weights(folder: Path) -> PartTensors | None:
    """The weights in a part's folder, safetensors before pickles and plain files before variants; None without any."""
    names = [path.name for path in folder.iterdir()]
    for stem in (DIFFUSERS, TRANSFORMERS):
        for variant in stem.variants(names)[:1]:
            path, tensors = read_weights(folder, stem, variant, None)
            part, naming = detect_part(tensors) or ("", PUBLISHED)
            return PartTensors(part, naming, tensors, path)
    return None


def with_modern_sample_size(model: Any) -> Any:
    """The model, with the setting that a pipeline puts right by the age of its file: what is written is of today."""
    if model.part == "unet" and has_legacy_sample_size(model.config):
        model.register_to_config(sample_size=64)
    return model
