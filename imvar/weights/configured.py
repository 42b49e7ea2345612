"""Components with a config file, and `from_pretrained` and `save_pretrained` of those without weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..atomic.file import write_text
from ..checks import as_path, check_type
from ..config import Configured, json_text
from ..errors import CheckpointError, InputError, in_checkpoint, invalid, short_repr, warn_user
from .hub import Hub, locate
from .json_files import read_json, safe_join
from .model_index import DIFFUSERS_VERSION, PARTS, class_named, default_class
from .options import SAVE_OPTIONS, filter_kwargs, loading_options, should_write
from .read_errors import kind_of

if TYPE_CHECKING:
    from .single_file import SingleFile

STRICT_PARTS = "unet", "vae"  # whose config files have no fields but their own; transformers' have many more


class ConfigFile:
    """A class whose config is a file of the name `config_name`: a component, or a pipeline with its index."""

    config_name: ClassVar[str] = "config.json"
    has_compatibles: ClassVar[bool] = False  # whether other classes read the same file

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | Path,
        return_unused_kwargs: bool = False,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **options: Any,
    ) -> Any:
        """Return the content of a config file, given by its own path or as in `from_pretrained`: a dictionary.

        With `return_unused_kwargs` the result is a tuple: that, and a dictionary of the `options` that are not used.
        """
        hub, unused = loading_options(options, revision, cache_dir, local_files_only, token)
        path = as_path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        if kind_of(path) != "file":
            path = cls.locate_config_file(pretrained_model_name_or_path, subfolder, hub)
        if return_unused_kwargs:
            return read_json(path), unused
        filter_kwargs(unused, (), f"{cls.__name__}.load_config")
        return read_json(path)

    @classmethod
    def locate_config_file(cls, source: str | Path, subfolder: str | None, hub: Hub) -> Path:
        """Return the config file in a folder, a hub repository or a bundled checkpoint, or in a `subfolder` of it."""
        name = f"{subfolder}/{cls.config_name}" if check_type("subfolder", subfolder, str) else cls.config_name
        folder = locate(source, hub, lambda names: [name])
        return safe_join(folder / (subfolder or ""), cls.config_name)


class ConfiguredComponent(ConfigFile, Configured):
    """A component whose config is a file: a scheduler, an image processor or a model."""

    part: ClassVar[str]

    def __init_subclass__(cls, part: str | None = None, also: Sequence[str] = (), **kwargs: Any) -> None:
        """Register a class for the folder `part` of checkpoints, under its own name and the names in `also`."""
        super().__init_subclass__(**kwargs)
        if part:
            cls.part = part
            PARTS[part] |= dict.fromkeys((cls.__name__, *also), cls)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        return_unused_kwargs: bool = False,
        **changes: Any,
    ) -> Self:
        """Load a config from a folder, a hub repository or a bundled checkpoint; `changes` replace its fields.

        `subfolder` is appended to the path. With `return_unused_kwargs` the result is a tuple: the component, and a
        dictionary of the changes and of the entries of the file that are no fields. Raises `CheckpointError` if the
        file is missing or has a value that this class does not support.
        """
        hub, changes = loading_options(changes, revision, cache_dir, local_files_only, token)
        path = cls.locate_config_file(pretrained_model_name_or_path, subfolder, hub)
        unused: dict[str, Any] = {}
        if check_type("return_unused_kwargs", return_unused_kwargs, bool):
            names = {f.name for f in fields(cls.config_class)}
            unused = {name: changes.pop(name) for name in changes.keys() - names}
        component = cls.build(cls.read_config(path, **changes), path)
        return (component, unused | component.extra_settings()) if return_unused_kwargs else component  # type: ignore

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | str | Path, return_unused_kwargs: bool = False, **changes: Any
    ) -> Self:
        """Return a component with this config, updated by `changes`; weights, if any, are random.

        `config` may be a path: it is read by `load_config`, with those of its options that are among the changes. With
        `return_unused_kwargs` the result is a tuple: the component, and a dictionary of the changes and of the entries
        of the config that are no fields of this class. Without it, such changes are ignored with a warning.
        """
        settings: Any = config
        if isinstance(config, (str, os.PathLike)):
            settings, changes = cls.load_config(config, return_unused_kwargs=True, **changes)
        return super().from_config(settings, return_unused_kwargs, **changes)

    @classmethod
    def read_config(cls, path: Path, **changes: Any) -> Any:
        """Return the validated config in the file `path`, with `changes` to its fields."""
        return cls.validate_config(read_json(path), path, **changes)

    @classmethod
    def validate_config(cls, settings: Mapping[str, Any], path: Path, **changes: Any) -> Any:
        """Return the config with the fields `settings`, read from `path`, and `changes`.

        Raises `CheckpointError` about the fields, and `InputError` about the changes, which are the caller's.
        """
        name = settings.get("_class_name")
        owners = [part for part, classes in PARTS.items() if isinstance(name, str) and name in classes]
        if owners and cls.part not in owners:
            got = f"{short_repr(name)}, of the {owners[0]}"
            raise invalid(CheckpointError, path, f"a class of the {cls.part}", got, key="_class_name")
        field_names = [f.name for f in fields(cls.config_class)]
        changes = cls.config_class.from_args(**filter_kwargs(changes, field_names, cls.__name__)).explicit()
        try:
            config = cls.config_class.from_dict(settings, **changes)
        except InputError as error:
            if other := cls.foreign_class_name(settings):
                expected, got = f"the config of the {cls.part}", f"that of a {other} ({error})"
                raise invalid(CheckpointError, path, expected, got, key=error.key) from error
            raise in_checkpoint(error, path) from error
        unknown = sorted(name for name in config.extra_fields if name[:1] != "_")
        if unknown and cls.part in STRICT_PARTS:
            names = ", ".join(map(short_repr, unknown[:10]))
            warn_user(f"{path}: {cls.__name__} has no config fields {names}; they are ignored")
        return config

    @classmethod
    def build(cls, config: Any, path: Path) -> Self:
        """Return a component with a config that was read from `path`; its `InputError` becomes a `CheckpointError`."""
        try:
            return cls(config)
        except InputError as error:
            raise in_checkpoint(error, path) from error

    @classmethod
    def config_for(cls, file: SingleFile, folder: Path | None) -> tuple[Mapping[str, Any], Path] | None:
        """Return the config that goes with a file of weights, and the path that it was read from; None without one.

        It is read from `folder` if one is given; else from the file next to the weights, if these are of this
        component alone; else from the metadata of the weights file.
        """
        path = file.path.with_name(cls.config_name) if folder is None else cls.find_config(folder)
        is_neighbour = file.is_single_part and kind_of(file.path) == kind_of(path) == "file"
        if folder is not None or (is_neighbour and not cls.foreign_class_name(read_json(path))):
            return read_json(path), path
        return (file.configs[cls.part], file.path) if cls.part in file.configs else None

    @classmethod
    def find_config(cls, folder: Path) -> Path:
        """Return this component's config file in `folder`, that of a checkpoint or of the component alone."""
        for place in (folder / cls.part, folder):
            if kind_of(place / cls.config_name) == "file":
                path = safe_join(place, cls.config_name)
                if name := cls.foreign_class_name(read_json(path)):
                    raise invalid(CheckpointError, path, f"the config of the {cls.part}", f"that of a {name}")
                return path
        raise invalid(CheckpointError, folder, f"{cls.part}/{cls.config_name} or {cls.config_name}", "neither")

    @classmethod
    def foreign_class_name(cls, settings: Mapping[str, Any]) -> str | None:
        """Return the class that a config names if it is not one of this part; None if it names none."""
        if cls.part == "scheduler":  # one scheduler reads the config of another, so `validate_config` decides
            return None
        architectures = settings.get("architectures")
        names = [settings.get("_class_name"), *(architectures if isinstance(architectures, list) else ())]
        known_names = {cls.__name__, *PARTS[cls.part]}
        return next((name for name in names if isinstance(name, str) and name not in known_names), None)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the config into a folder, which is created if needed, in the published format.

        `options` are those of models; of these only `is_main_process=False` has an effect: nothing is written.
        """
        options = filter_kwargs(options, SAVE_OPTIONS, f"{type(self).__name__}.save_pretrained")
        if should_write(options.get("is_main_process")):
            self.save_config(save_directory)

    def save_config(self, save_directory: str | Path, **options: Any) -> None:
        """Write the config file alone into a folder, which is created if needed. There are no `options`."""
        filter_kwargs(options, (), f"{type(self).__name__}.save_config")
        write_text(as_path("save_directory", save_directory) / self.config_name, self.to_json_string())

    def to_json_string(self) -> str:
        """Return the text of the config file."""
        return json_text(self.saved_config())

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Write the config to a file of this path."""
        write_text(as_path("json_file_path", json_file_path), self.to_json_string())

    def saved_config(self) -> Mapping[str, Any]:
        """Return the content of the config file: the config, the class, and the version of the format."""
        return self.config.to_dict() | {"_class_name": type(self).__name__, "_diffusers_version": DIFFUSERS_VERSION}


def configured_from_single(part: str, file: SingleFile, folder: Path | None, image_encoder: Any) -> Any:
    """Return the scheduler or feature extractor for the models in `file`, with the published config if it has none.

    `folder` is that of `from_single_file(config=)`; `image_encoder`, if any, determines the size of the images.
    """
    from .infer_config import published_config  # imported here to keep `import imvar` fast

    size = image_encoder.config.image_size if image_encoder is not None else 224
    component_cls = default_class(part)
    settings, path = component_cls.config_for(file, folder) or (published_config(part, size), file.path)
    if part == "scheduler":
        component_cls = class_named(part, settings.get("_class_name"), path)
    return component_cls.build(component_cls.validate_config(settings, path), path)
