"""Components whose config lives in a file of its own, and `from_pretrained` and `save_pretrained` of those without weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..atomic.file import write_text
from ..checks import as_path, check_type
from ..config import Configured, json_text
from ..errors import CheckpointError, InputError, short_repr
from .hub import Hub, locate
from .json_files import read_json, safe_join
from .model_index import FORMAT, PARTS, class_named, default_class
from .options import SAVE_OPTIONS, filter_kwargs, should_write

if TYPE_CHECKING:
    from .single_file import SingleFile

PLAIN = "unet", "vae"  # whose files hold their own settings and nothing else


class ConfiguredComponent(Configured):
    """A part whose settings live in a file of their own."""

    config_name: ClassVar[str] = "config.json"
    part: ClassVar[str]

    def __init_subclass__(cls, part: str | None = None, also: Sequence[str] = (), **more: Any):
        """`part`: the folder of a checkpoint that this class serves; `also`: other names that it goes by there."""
        super().__init_subclass__(**more)
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
        **changes: Any,
    ) -> Self:
        """Read settings from a folder, a hub repository or a bundled checkpoint; `changes` come on top.

        `subfolder` is part of what the caller names, as if the path ended in it. Raises `CheckpointError` for a file
        that is missing or holds what this part cannot honour.
        """
        name = f"{subfolder}/{cls.config_name}" if check_type("subfolder", subfolder, str) else cls.config_name
        hub = Hub(revision, cache_dir, local_files_only, token)
        folder = locate(pretrained_model_name_or_path, hub, lambda names: [name])
        path = safe_join(folder / (subfolder or ""), cls.config_name)
        return cls.build(cls.read_config(path, **changes), path)

    @classmethod
    def read_config(cls, path: Path, **changes: Any) -> Any:
        """The settings in `path`, checked; `changes` are checked as constructor arguments are."""
        return cls.validate_config(read_json(path), path, **changes)

    @classmethod
    def validate_config(cls, settings: Mapping[str, Any], path: Path, **changes: Any) -> Any:
        """Settings that came from `path`, checked, and `changes`, checked as constructor arguments are."""
        name = settings.get("_class_name")
        owners = [part for part, classes in PARTS.items() if isinstance(name, str) and name in classes]
        if owners and cls.part not in owners:
            raise CheckpointError(
                f"is {short_repr(name)}, of the {owners[0]}; settings of the {cls.part} would do",
                path=path,
                key="_class_name",
            )
        known = [f.name for f in fields(cls.config_class)]
        changes = cls.config_class.from_args(**filter_kwargs(changes, known, cls.__name__)).explicit()
        try:
            config = cls.config_class.from_dict(settings, **changes)
            if cls.part in PLAIN and (odd := sorted(name for name in config.extra_fields if name[:1] != "_")):
                warnings.warn(
                    f"{path}: {', '.join(map(short_repr, odd[:10]))}: no setting of {cls.__name__}, so left alone",
                    stacklevel=5,
                )
            return config
        except InputError as error:
            other = cls.foreign_class_name(settings)
            reason = f"{error}; these are the settings of a {other}" if other else str(error)
            raise CheckpointError(reason, path=path, key=error.key) from error

    @classmethod
    def build(cls, config: Any, path: Path) -> Self:
        """A part with the settings that `path` holds, or a `CheckpointError` for those that do not go together."""
        try:
            return cls(config)
        except InputError as error:
            raise CheckpointError(str(error), path=path, key=error.key) from error

    @classmethod
    def settings_for(cls, file: SingleFile, config: Path | None) -> tuple[Mapping[str, Any], Path] | None:
        """This part's settings for a file of weights, and where they are: in the folder `config`, which may be that of
        a whole checkpoint, else beside the file if it holds nothing but this part, else in it; else None."""
        path = file.path.with_name(cls.config_name) if config is None else cls.settings_file(config)
        beside = (
            file.is_single_part
            and file.path.is_file()
            and path.is_file()
            and not cls.foreign_class_name(read_json(path))
        )
        if config is not None or beside:
            return read_json(path), path
        return (file.settings[cls.part], file.path) if cls.part in file.settings else None

    @classmethod
    def settings_file(cls, config: Path) -> Path:
        """This part's settings in the folder `config`, which may be that of a whole checkpoint."""
        for folder in (config / cls.part, config):
            if (folder / cls.config_name).is_file():
                path = safe_join(folder, cls.config_name)
                if name := cls.foreign_class_name(read_json(path)):
                    raise CheckpointError(f"holds the settings of a {name}, not of the {cls.part}", path=path)
                return path
        raise CheckpointError(
            f"holds no settings of the {cls.part}: looked for {cls.part}/{cls.config_name} and {cls.config_name}",
            path=config,
        )

    @classmethod
    def foreign_class_name(cls, settings: Mapping[str, Any]) -> str | None:
        """The class that these settings say they are of, if it is none of this part; None where they say nothing."""
        several = settings.get("architectures")
        names = [settings.get("_class_name"), *(several if isinstance(several, list) else ())]
        strange = [name for name in names if isinstance(name, str) and name not in (cls.__name__, *PARTS[cls.part])]
        return strange[0] if strange and cls.part != "scheduler" else None  # of those, other code tells more

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the settings into a folder, made if need be, in the published format.

        `options` are those of parts with weights, of which `is_main_process=False` alone changes something here.
        """
        options = filter_kwargs(options, SAVE_OPTIONS, f"{type(self).__name__}.save_pretrained")
        if not should_write(options.get("is_main_process")):
            return
        text = json_text(self.saved_config())
        write_text(as_path("save_directory", save_directory) / self.config_name, text)

    def saved_config(self) -> Mapping[str, Any]:
        """What the settings file says: the settings, and who wrote them in which format."""
        return self.config.to_dict() | {"_class_name": type(self).__name__, "_diffusers_version": FORMAT}


def configured_from_single(part: str, file: SingleFile, config: Path | None, image_encoder: Any) -> Any:
    """A part without weights to go with those in `file`, by the settings that are found, else by the published ones."""
    from .infer_config import settings_without_weights

    size = image_encoder.config.image_size if image_encoder is not None else 224
    settings, path = default_class(part).settings_for(file, config) or (settings_without_weights(part, size), file.path)
    kind = class_named(part, settings.get("_class_name"), path) if part == "scheduler" else default_class(part)
    return kind.build(kind.validate_config(settings, path), path)
