"""Reading the components that `model_index.json` lists, each from a folder of its own."""

from __future__ import annotations

import inspect
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from ..atomic.folder import matching
from ..checks import Dtype, as_dtype
from ..errors import CheckpointError, InputTypeError, invalid, short_repr, warn_user
from ..weights.hub import names_in
from ..weights.json_files import read_json, safe_join
from ..weights.model_index import (
    INDEX,
    KNOWN_LIBRARIES,
    OPTIONAL_COMPONENTS,
    PARTS,
    UNLISTED_PARTS,
    class_named,
    default_class,
)
from ..weights.pretrained import PretrainedModel
from ..weights.read_errors import kind_of


def read_components(
    folder: Path,
    parameters: Mapping[str, inspect.Parameter],
    overrides: Mapping[str, Any],
    dtypes: Mapping[str, Dtype],
    disable_mmap: bool,
    **reading: Any,
) -> dict[str, Any]:
    """Return the components and settings in `folder` for those `parameters` of a pipeline that have no override."""
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    index = dict.fromkeys(UNLISTED_PARTS) | read_index(safe_join(folder, INDEX), parameters)
    variant = reading["variant"]
    in_folders = [f"{name}/*" for name, value in index.items() if is_class_entry(value)]
    if variant and not any(f".{variant}." in path.name for path in matching(folder, in_folders)):
        raise invalid(CheckpointError, folder, f"files of variant={variant!r}", "none")
    missing = required - overrides.keys() - index.keys()
    empty = {name for name in required - overrides.keys() - missing - {*OPTIONAL_COMPONENTS} if index[name] is None}
    for names, got in (missing, "no entry"), (empty, "an empty entry"):
        for name in sorted(names):
            hint = f"pass from_pretrained(..., {name}=...)"
            raise invalid(CheckpointError, folder / INDEX, "a library and a class", got, hint, key=name)
    return {
        name: read_component(folder, name, value, dtypes, disable_mmap, **reading)
        if name in required or name in PARTS or (parameters[name].default is None and is_class_entry(value))
        else read_setting(folder, name, value, parameters[name].default)
        for name, value in index.items()
        if name not in overrides
    }


def read_index(path: Path, parameters: Container[str]) -> dict[str, Any]:
    """Return the components and settings in `model_index.json`, None for empty ones; warn about unknown ones."""
    index = {key: None if value == [None, None] else value for key, value in read_json(path).items() if key[:1] != "_"}
    if unknown := sorted(key for key, value in index.items() if key not in parameters and value is not None):
        warn_user(f"{path}: {', '.join(unknown)}: ignored, not a component or setting of this pipeline")
    return {key: value for key, value in index.items() if key in parameters}


def read_component(
    folder: Path, name: str, value: Any, dtypes: Mapping[str, Dtype], disable_mmap: bool, **reading: Any
) -> Any:
    """Return the component that `model_index.json` lists as `value`. Class names are looked up, never imported."""
    if value is None:
        return None
    if not is_class_entry(value):
        classes = ", ".join(PARTS.get(name, {})) or "(none)"
        expected = f"a library and one of the classes {classes}"
        raise invalid(CheckpointError, folder / INDEX, expected, short_repr(value), key=name)
    kind = class_named(name, value[1], folder / INDEX)
    if value[0].partition(".")[0] not in KNOWN_LIBRARIES:
        hint = f"pass others as from_pretrained(..., {name}=...)"
        expected = f"one of the libraries {', '.join(KNOWN_LIBRARIES)}"
        raise invalid(CheckpointError, folder / INDEX, expected, short_repr(value[0]), hint, key=name)
    folder = safe_join(folder, name)
    if not issubclass(kind, PretrainedModel):
        return kind.from_pretrained(folder)
    if reading["variant"] and kind_of(folder) == "folder":  # without it if the folder has no files of it
        reading["variant"] = select_weights([path.name for path in folder.iterdir()], kind, **reading)[1]
    return kind.read(folder, dtype=dtypes[name], disable_mmap=disable_mmap, **reading)


def is_class_entry(value: Any) -> bool:
    """Return whether an entry of `model_index.json` is a library and a class."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(entry, str) for entry in value)


def read_setting(folder: Path, name: str, value: Any, default: Any) -> Any:
    """Return a setting of the pipeline itself, of the type of its default."""
    if type(value) is not type(default) and isinstance(default, (bool, int, float, str)):
        expected = f"a {type(default).__name__} such as {default!r}"
        raise invalid(CheckpointError, folder / INDEX, expected, short_repr(value), key=name)
    return value


def dtypes_by_component(dtype: Any) -> dict[str, Dtype]:
    """Return a dtype for each component, from one for all or a dictionary with a `"default"`."""
    if not isinstance(dtype, Mapping):
        dtype = {"default": dtype}
    if unknown := sorted(set(dtype) - PARTS.keys() - {"default"}, key=str):
        raise invalid(InputTypeError, "dtype", f"the keys {', '.join(PARTS)} or 'default'", short_repr(unknown[0]))
    return {name: as_dtype(dtype.get(name, dtype.get("default"))) for name in PARTS}


def select_weights(
    names: list[str] | None, model: type[PretrainedModel], variant: str | None, use_safetensors: bool | None
) -> tuple[list[str], str | None]:
    """Return the weights files to read and their variant, None if only the plain files are there."""
    try:
        return model.weights_name.select(names, variant, use_safetensors), variant
    except CheckpointError:
        return model.weights_name.select(names, None, use_safetensors), None


def files_to_read(names: set[str] | None, overrides: Mapping[str, Any], **reading: Any) -> list[str]:
    """Return those of the `names` in a repository that this pipeline reads; None where names are not known."""
    files = [INDEX]
    for part in PARTS:
        model = default_class(part)
        in_folder = names_in(names, f"{part}/")
        if part not in overrides and in_folder != []:
            weights = select_weights(in_folder, model, **reading)[0] if issubclass(model, PretrainedModel) else []
            files += [f"{part}/{name}" for name in (model.config_name, *weights)]
    return files
