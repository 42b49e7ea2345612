"""A whole pipeline on disk: `model_index.json` and one folder per part."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Self

from ..atomic.file import write_text
from ..atomic.folder import atomic_folder, break_hard_links, read_consistently
from ..checks import Dtype, as_dtype, as_path, check_type
from ..config import Config
from ..errors import CheckpointError, InputError, InputTypeError, short_repr
from ..weights.configured import ConfiguredComponent, configured_from_single
from ..weights.hub import Hub, locate, within
from ..weights.json_files import read_json, safe_join
from ..weights.model_index import (
    INDEX,
    KNOWN_LIBRARIES,
    OPTIONAL_COMPONENTS,
    PARTS,
    UNLISTED_PARTS,
    class_named,
    default_class,
    index_entry,
    index_text,
)
from ..weights.options import READ_OPTIONS, filter_kwargs, locate_config, resolve_ema, should_write
from ..weights.pretrained import PretrainedModel


class PretrainedPipeline:
    """`from_pretrained` and `save_pretrained` of a pipeline."""

    components: Any
    _settings: dict[str, Any]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: Any = None,
        dtype: Any = None,
        revision: str | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        low_cpu_mem_usage: bool = True,
        disable_mmap: bool = False,
        compile: bool = False,
        **overrides: Any,
    ) -> Self:
        """A pipeline from a folder or a hub repository in the published layout, or "imvar-emoji", which is bundled.

        `dtype` (or `torch_dtype`): one for all parts, or a dictionary of part to dtype with `"default"`; float32
        unless said. `overrides` are parts to use instead of the checkpoint's, None to go without, and settings of
        the pipeline such as `requires_safety_checker`. `variant` chooses files such as `*.fp16.safetensors` where
        a part has them. Weights are always mapped rather than copied, whatever `low_cpu_mem_usage` and
        `disable_mmap` say. `compile`: call `compile()` on it.
        Raises `CheckpointError` naming the file and what is wrong with it.
        """
        check_type("compile", compile, bool)
        check_type("variant", variant, str)
        check_type("low_cpu_mem_usage", low_cpu_mem_usage, bool)
        check_type("disable_mmap", disable_mmap, bool)
        known = cls.parameters()
        parts = [name for name, parameter in known.items() if parameter.default is parameter.empty]
        overrides = filter_kwargs(overrides, known, f"{cls.__name__}.from_pretrained")
        dtypes = dtypes_by_part(torch_dtype if dtype is None else dtype)
        reading = {"variant": variant, "use_safetensors": use_safetensors}
        hub = Hub(revision, cache_dir, local_files_only, token)
        folder = locate(pretrained_model_name_or_path, hub, lambda names: wanted_files(names, overrides, **reading))

        def listed() -> dict[str, Any]:
            index = dict.fromkeys(UNLISTED_PARTS) | read_index(safe_join(folder, INDEX), known)
            if variant and not any(f".{variant}." in path.name for path in folder.glob("*/*")):
                raise CheckpointError(f"variant={variant!r}: no part has files of this variant", path=folder)
            if absent := sorted(set(parts) - index.keys() - overrides.keys()):
                raise CheckpointError(
                    f"is not listed; from_pretrained(..., {absent[0]}=...) would do", path=folder / INDEX, key=absent[0]
                )
            there = {name for name, value in index.items() if value is not None}
            if empty := sorted(set(parts) - overrides.keys() - set(OPTIONAL_COMPONENTS) - there):
                raise CheckpointError(
                    f"is empty; from_pretrained(..., {empty[0]}=...) would do", path=folder / INDEX, key=empty[0]
                )
            return {
                name: read_part(folder, name, value, dtypes, **reading)
                if name in parts or isinstance(value, list)
                else setting(folder, name, value, known[name].default)
                for name, value in index.items()
                if name not in overrides
            }

        found = read_consistently(folder, wanted_files(None, overrides, **reading), listed)
        try:
            pipe = cls(**(found | overrides))
        except InputError as error:
            if error.key is None or error.key in overrides:  # the caller's doing
                raise
            raise CheckpointError(str(error), path=folder / INDEX, key=error.key) from error
        if compile:
            pipe.compile()  # type: ignore[attr-defined]
        return pipe

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | Path,
        *,
        config: str | Path | None = None,
        torch_dtype: Any = None,
        dtype: Any = None,
        ema: str = "auto",
        extract_ema: bool | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **overrides: Any,
    ) -> Self:
        """A pipeline from one `.ckpt` or safetensors file in an original layout.

        The file: a path, a link to one on the hub, or "owner/name/file". `config`: the folder or hub repository
        of a checkpoint whose settings these weights go with; else they are what the file says, what the tensors'
        shapes tell, and the published ones. Original files hold no safety checker: hand one over
        (`safety_checker=`), or there will be none. `ema` and `extract_ema` are as for one part, the rest is as in
        `from_pretrained`.
        """
        from ..weights.single_file import SingleFile  # see weights/__init__.py

        hub = Hub(revision, cache_dir, local_files_only, token)
        overrides = {name: value for name, value in overrides.items() if name not in READ_OPTIONS}
        overrides = filter_kwargs(overrides, cls.parameters(), f"{cls.__name__}.from_single_file")
        dtypes = dtypes_by_part(torch_dtype if dtype is None else dtype)
        file = SingleFile.from_source(pretrained_model_link_or_path, hub)
        file.check_complete(overrides)
        folder, ema = locate_config(config, hub), resolve_ema(ema, extract_ema)
        found = {
            part: default_class(part).from_single(file, folder, ema=ema, dtype=dtypes[part])
            for part in file.parts
            if part not in overrides
        }
        for part in {"scheduler", "feature_extractor"} - overrides.keys():
            found[part] = configured_from_single(part, file, folder, found.get("image_encoder"))
        found.setdefault("safety_checker", None)
        return cls(**(found | overrides))

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        **options: Any,
    ) -> None:
        """Write all parts into a folder, made if need be, in the layout that diffusers reads.

        All of it or nothing, even if killed; `atomic/folder.py` says how, and where that cannot be. Other files
        that are there stay. `is_main_process=False` writes nothing, as in a distributed run.
        """
        options = filter_kwargs(options, ("is_main_process",), f"{type(self).__name__}.save_pretrained")
        if not should_write(options.get("is_main_process")):
            return
        for name, part in self.components.items():
            if part is not None and not hasattr(part, "save_pretrained"):
                raise InputTypeError(f"{name}: a {type(part).__name__} cannot be saved: it has no save_pretrained")
            if (of := getattr(part, "part", name)) != name:
                raise InputTypeError(f"{name}: a {type(part).__name__} came, which is for {of}", key=name)
        check_type("safe_serialization", safe_serialization, bool)
        sizes = {} if max_shard_size is None else {"max_shard_size": max_shard_size}  # each part has its own default
        ours = (ConfiguredComponent.save_pretrained, PretrainedModel.save_pretrained)
        with atomic_folder(as_path("save_directory", save_directory)) as new:
            for name, part in self.components.items():
                if part is not None:
                    if getattr(type(part), "save_pretrained", None) not in ours:
                        break_hard_links(new / name)  # it may write in place
                    part.save_pretrained(new / name, safe_serialization=safe_serialization, variant=variant, **sizes)
            write_text(new / INDEX, index_text(type(self).__name__, self.components, self._settings))

    @property
    def config(self) -> Config:
        """The pipeline's own settings, and the class of each part."""
        return Config.from_dict(
            self._settings | {name: index_entry(name, part) for name, part in self.components.items()}
        )

    @classmethod
    def parameters(cls) -> dict[str, inspect.Parameter]:
        """The constructor's arguments by name; what lies behind `*args` and `**kwargs` are those of the next class."""
        found: dict[str, inspect.Parameter] = {}
        for base in cls.__mro__:
            if "__init__" in vars(base):
                own = list(inspect.signature(base.__init__).parameters.values())[1:]
                named = [p for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
                found = {p.name: p for p in named} | found
                if len(named) == len(own):
                    break
        return found


def dtypes_by_part(dtype: Any) -> dict[str, Dtype]:
    """One dtype per part, from one for all or a dictionary with a `"default"`."""
    if not isinstance(dtype, Mapping):
        dtype = {"default": dtype}
    if odd := sorted(set(dtype) - PARTS.keys() - {"default"}, key=str):
        raise InputTypeError(f"dtype: {odd[0]!r} is no part; {', '.join(PARTS)} or 'default' would do")
    return {name: as_dtype(dtype.get(name, dtype.get("default"))) for name in PARTS}


def read_index(path: Path, known: Container[str]) -> dict[str, Any]:
    """The parts and settings that `model_index.json` lists, None for parts left empty; unknown ones with a warning."""
    index = {key: None if value == [None, None] else value for key, value in read_json(path).items() if key[:1] != "_"}
    if odd := sorted(key for key, value in index.items() if key not in known and value is not None):
        warnings.warn(f"{path}: {', '.join(odd)}: no part or setting of this pipeline, so left alone", stacklevel=5)
    return {key: value for key, value in index.items() if key in known}


def read_part(folder: Path, name: str, value: Any, dtypes: Mapping[str, Dtype], **reading: Any) -> Any:
    """The part that `model_index.json` lists as `value`; class names are looked up, never imported."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(entry, str) for entry in value):
        raise CheckpointError(
            f"is {short_repr(value)}; a library and a class would do, of which imvar has "
            f"{', '.join(PARTS.get(name, {})) or 'none'}",
            path=folder / INDEX,
            key=name,
        )
    found = class_named(name, value[1], folder / INDEX)
    if value[0].partition(".")[0] not in KNOWN_LIBRARIES:
        raise CheckpointError(
            f"is of the library {short_repr(value[0])}; {', '.join(KNOWN_LIBRARIES)} would do. Others can be "
            f"handed over: from_pretrained(..., {name}=...)",
            path=folder / INDEX,
            key=name,
        )
    folder = safe_join(folder, name)
    if not issubclass(found, PretrainedModel):
        return found.from_pretrained(folder)
    return found.read(folder, dtype=dtypes[name], **part_reading(folder, found, **reading))


def setting(folder: Path, name: str, value: Any, default: Any) -> Any:
    """A setting of the pipeline itself, of the type of its default."""
    if type(value) is not type(default) and isinstance(default, (bool, int, float, str)):
        raise CheckpointError(
            f"is {short_repr(value)}; a {type(default).__name__} such as {default!r} would do",
            path=folder / INDEX,
            key=name,
        )
    return value


def part_reading(folder: Path, model: type[PretrainedModel], variant: str | None, use_safetensors: bool | None) -> Any:
    """The variant for parts that have it, the plain files for parts that have not."""
    if variant and folder.is_dir():
        variant = chosen([path.name for path in folder.iterdir()], model, variant, use_safetensors)[1]
    return {"variant": variant, "use_safetensors": use_safetensors}


def chosen(
    names: list[str] | None, model: type[PretrainedModel], variant: str | None, use_safetensors: bool | None
) -> tuple[list[str], str | None]:
    """The weights files to read, and whether they are the variant's."""
    try:
        return model.stem.choose(names, variant, use_safetensors), variant
    except CheckpointError:
        return model.stem.choose(names, None, use_safetensors), None


def wanted_files(names: set[str] | None, overrides: Mapping[str, Any], **reading: Any) -> list[str]:
    """Of all files in a repository, those that this pipeline reads; None where they are not known."""
    wanted = [INDEX]
    for part in PARTS:
        model = default_class(part)
        inside = within(names, f"{part}/")
        if part not in overrides and inside != []:
            files = chosen(inside, model, **reading)[0] if issubclass(model, PretrainedModel) else []
            wanted += [f"{part}/{name}" for name in (model.config_name, *files)]
    return wanted
