"""What a checkpoint of any kind holds: its parts, each found, understood and complete, with none of it copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError
from .files import inside, read_json
from .index import PARTS, first_class, served
from .keymap import PUBLISHED, Naming
from .pretrained import PretrainedModel, settings_part
from .reading import read_weights
from .settings import settings_of
from .single import EMA, RAW, Held, SingleFile, recognise
from .stems import DIFFUSERS, TRANSFORMERS


@dataclass(frozen=True)
class Found:
    """A part of a checkpoint: an object of its class, with the weights as the file has them, and where it is from."""

    part: str
    value: Any
    path: Path
    how: str
    """In words: the dialect of the names, and which weights were taken where there was a choice."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """The tensors beside the weights that no model has a use for: how many are called how."""

    @property
    def has_weights(self) -> bool:
        return isinstance(self.value, PretrainedModel)

    @property
    def dtypes(self) -> Counter[str]:
        """How many tensors there are of each dtype."""
        return Counter(str(tensor.dtype).removeprefix("torch.") for tensor in self.value.state_dict().values())


@dataclass(frozen=True)
class Survey:
    """A checkpoint that was looked over. `notes` say, in words, what of it is left where it is."""

    source: Path
    kind: str
    parts: dict[str, Found]
    notes: list[str] = field(default_factory=list)


def survey(source: str | Path, *, ema: str = "auto", config: Path | None = None, only: str | None = None) -> Survey:
    """Look over a folder in diffusers' layout, the folder of one part, or a single file in any known dialect.

    `only`: the one part that is wanted. `ema` and `config` are as in `from_single_file`. Raises `CheckpointError` for
    a source that holds nothing known, and for a part that is not complete, naming the tensor.
    """
    source = Path(source)
    if source.is_dir():
        found = survey_folder(source, ema, config, only)
    elif source.exists():
        found = survey_file(SingleFile.read(source), ema, config, only)
    else:
        raise CheckpointError("no such file or folder", path=source)
    if only and only not in found.parts:
        raise CheckpointError(f"holds no {only}; there is {' and '.join(found.parts) or 'no part at all'}", path=source)
    return found


def survey_file(file: SingleFile, ema: str, config: Path | None, only: str | None) -> Survey:
    wanted = [part for part in file.parts if only in (None, part)]
    if only is None:
        file.check_known()
    parts, notes = {}, []
    for part in wanted:
        held = file.part(part, ema)
        model: Any = first_class(part).read_single(file, config, ema=ema, dtype=None)
        how = held.naming.dialect.value
        if part == "unet":
            how += chosen(held.naming, file)
        parts[part] = Found(part, model, file.path, how, dropped_of(model, held))
    if "unet" in parts and not file.alone and only is None:
        for part in ("scheduler", "feature_extractor"):
            encoder = parts["image_encoder"].value if "image_encoder" in parts else None
            value = settings_part(part, file, config, encoder)
            where = "--config" if config else "this file" if part in file.settings else "the published settings"
            parts[part] = Found(part, value, file.path, f"from {where}")
    if tables := [name for name in file.tensors if file.droppable(name)]:
        notes.append(f"{len(tables)} tensors of the schedule and of the moving average's state are left out")
    if file.aside:
        notes.append(f"left where they are: {', '.join(file.aside)}")
    return Survey(file.path, "one part alone" if file.alone else "the original layout, one file", parts, notes)


def chosen(naming: Naming, file: SingleFile) -> str:
    """Which of the UNet's weights were taken, and what was there."""
    there = {held.naming for held in file.parts["unet"]}
    if naming == EMA:
        return ", moving average (EMA) taken, " + ("raw weights left" if RAW in there else "there are no raw weights")
    if naming == RAW:
        return ", raw weights taken, " + ("moving average (EMA) left" if EMA in there else "there is no moving average")
    return ""


def survey_folder(folder: Path, ema: str, config: Path | None, only: str | None) -> Survey:
    if ema != "auto":
        raise InputError(f"ema={ema!r}: a folder has one set of weights for the UNet, so there is nothing to choose; "
                         "'auto' would do")
    places = {part: folder / part for part in PARTS if (folder / part).is_dir() and only in (None, part)}
    if places:
        found = [survey_part(part, inside(folder, part), config) for part in places]
        return Survey(folder, "a folder in diffusers' layout", {part.part: part for part in found})
    held = held_in(folder)
    alone = recognise(held.tensors) if held else None
    if alone is None:
        raise CheckpointError("holds neither parts of a checkpoint, such as unet/, nor the weights of one", path=folder)
    return Survey(folder, "the folder of one part", {alone[0]: survey_part(alone[0], folder, config)})


def survey_part(part: str, folder: Path, config: Path | None) -> Found:
    """One part's folder: settings, and weights if its kind has any."""
    kind = first_class(part)
    at = next((place for place in (config / part, config) if (place / kind.config_name).is_file()), folder) \
        if config else folder
    path = inside(at, kind.config_name)
    if not issubclass(kind, PretrainedModel):
        settings = read_json(path)
        kind = served(part, settings.get("_class_name"), path) if part == "scheduler" else kind
        return Found(part, kind.built(kind.checked(settings, path), path), path, "settings alone")
    held = held_in(folder)
    if held is None:
        raise CheckpointError("holds no weights", path=folder)
    held = replace(held, part=part)
    told = path.is_file()
    weights = held.path or folder
    settings = kind.read_config(path) if told else kind.checked(settings_of(held), weights)
    model = kind.holding(held.tensors, settings, path if told else weights, dtype=None, naming=held.naming,
                         path=weights)
    keymap = model.keymap  # made anew at every asking
    current = {keymap.sources(name, held.naming)[0].name for name in model.state_dict()}
    older = held.naming == PUBLISHED and not current <= held.tensors.keys()
    how = held.naming.dialect.value + (" of 2022" if older else "")
    return Found(part, model, weights, how, dropped_of(model, held))


def held_in(folder: Path) -> Held | None:
    """The weights in a part's folder, safetensors before pickles and plain files before variants; None without any."""
    names = [path.name for path in folder.iterdir()]
    for stem in (DIFFUSERS, TRANSFORMERS):
        for variant in stem.variants(names)[:1]:
            path, tensors = read_weights(folder, stem, variant, None)
            part, naming = recognise(tensors) or ("", PUBLISHED)
            return Held(part, naming, tensors, path)
    return None


def dropped_of(model: PretrainedModel, held: Held) -> Mapping[str, int]:
    keymap = model.keymap
    return Counter(pattern for name in held.tensors if (pattern := keymap.drops(name, held.naming)))
