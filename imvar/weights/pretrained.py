"""`from_pretrained` and `save_pretrained`, for parts with weights and for parts without."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..atomic.folder import atomic_folder, read_consistently
from ..checks import Dtype, as_dtype, as_path, check_type
from ..config import Configured, json_text
from ..errors import CheckpointError, InputError, short_repr
from .filenames import DIFFUSERS, TRANSFORMERS, WeightsName
from .hub import Hub, locate, read_json, safe_join, within, write_text
from .keymap import Keymap, Naming
from .loading import SkipInit, load, rename_published_keys
from .model_index import FORMAT, PARTS, first_class, served
from .options import READING, SAVING, config_folder, filter_kwargs, resolve_ema, should_write
from .reading import read_weights

if TYPE_CHECKING:
    from .single_file import SingleFile

TRANSFORMERS_FORMAT = "5.23.0"
PLAIN = "unet", "vae"  # whose files hold their own settings and nothing else
MAX_LAYERS_TO_LIST, MAX_LAYERS = (
    100,
    1000,
)  # layers: so few are built, to name the tensors that a file lacks for them; so many never are


class Pretrained(Configured):
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
        return cls.built(cls.read_config(path, **changes), path)

    @classmethod
    def read_config(cls, path: Path, **changes: Any) -> Any:
        """The settings in `path`, checked; `changes` are checked as constructor arguments are."""
        return cls.checked(read_json(path), path, **changes)

    @classmethod
    def checked(cls, settings: Mapping[str, Any], path: Path, **changes: Any) -> Any:
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
        changes = cls.config_class.of(**filter_kwargs(changes, known, cls.__name__)).explicit()
        try:
            config = cls.config_class.read(settings, **changes)
            if cls.part in PLAIN and (odd := sorted(name for name in config.foreign if name[:1] != "_")):
                warnings.warn(
                    f"{path}: {', '.join(map(short_repr, odd[:10]))}: no setting of {cls.__name__}, so left alone",
                    stacklevel=5,
                )
            return config
        except InputError as error:
            other = cls.strange(settings)
            reason = f"{error}; these are the settings of a {other}" if other else str(error)
            raise CheckpointError(reason, path=path, key=error.key) from error

    @classmethod
    def built(cls, config: Any, path: Path) -> Self:
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
        beside = file.alone and file.path.is_file() and path.is_file() and not cls.strange(read_json(path))
        if config is not None or beside:
            return read_json(path), path
        return (file.settings[cls.part], file.path) if cls.part in file.settings else None

    @classmethod
    def settings_file(cls, config: Path) -> Path:
        """This part's settings in the folder `config`, which may be that of a whole checkpoint."""
        for folder in (config / cls.part, config):
            if (folder / cls.config_name).is_file():
                path = safe_join(folder, cls.config_name)
                if name := cls.strange(read_json(path)):
                    raise CheckpointError(f"holds the settings of a {name}, not of the {cls.part}", path=path)
                return path
        raise CheckpointError(
            f"holds no settings of the {cls.part}: looked for {cls.part}/{cls.config_name} and {cls.config_name}",
            path=config,
        )

    @classmethod
    def strange(cls, settings: Mapping[str, Any]) -> str | None:
        """The class that these settings say they are of, if it is none of this part; None where they say nothing."""
        several = settings.get("architectures")
        names = [settings.get("_class_name"), *(several if isinstance(several, list) else ())]
        strange = [name for name in names if isinstance(name, str) and name not in (cls.__name__, *PARTS[cls.part])]
        return strange[0] if strange and cls.part != "scheduler" else None  # of those, other code tells more

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the settings into a folder, made if need be, in the published format.

        `options` are those of parts with weights, of which `is_main_process=False` alone changes something here.
        """
        options = filter_kwargs(options, SAVING, f"{type(self).__name__}.save_pretrained")
        if not should_write(options.get("is_main_process")):
            return
        text = json_text(self.config_file())
        write_text(as_path("save_directory", save_directory) / self.config_name, text)

    def config_file(self) -> Mapping[str, Any]:
        """What the settings file says: the settings, and who wrote them in which format."""
        return self.config.to_dict() | {"_class_name": type(self).__name__, "_diffusers_version": FORMAT}


class PretrainedModel(Pretrained, nn.Module):
    """A model: settings, weights, and the table that knows what files call its weights."""

    stem: ClassVar[WeightsName] = DIFFUSERS

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.register_load_state_dict_pre_hook(rename_published_keys)

    @property
    def keymap(self) -> Keymap:
        """The dictionary between our names and the published ones."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        use_safetensors: bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        low_cpu_mem_usage: bool = True,
        disable_mmap: bool = False,
        **changes: Any,
    ) -> Self:
        """Read settings and weights from a folder, a hub repository or a bundled checkpoint.

        `changes` of settings come on top. Weights are float32 unless another `dtype` is named ("auto": the widest
        that the file has), and are mapped from the file where they need no conversion, whatever `low_cpu_mem_usage`
        and `disable_mmap` say. The model is in eval mode. Raises `CheckpointError` naming the file, and the tensor
        that is missing, unknown or misshapen.
        """
        wanted_dtype = as_dtype(torch_dtype if dtype is None else dtype)
        prefix = f"{subfolder}/" if check_type("subfolder", subfolder, str) else ""
        check_type("low_cpu_mem_usage", low_cpu_mem_usage, bool)
        check_type("disable_mmap", disable_mmap, bool)

        def wanted(names: set[str] | None) -> list[str]:
            files = cls.stem.choose(within(names, prefix), variant, use_safetensors)
            return [prefix + name for name in (cls.config_name, *files)]

        hub = Hub(revision, cache_dir, local_files_only, token)
        folder = locate(pretrained_model_name_or_path, hub, wanted) / prefix
        return cls.read(folder, variant=variant, dtype=wanted_dtype, use_safetensors=use_safetensors, **changes)

    @classmethod
    def least_tensors(cls, config: Any) -> int:
        """How many tensors a model with these settings has at the least, told without building it."""
        return 0

    @classmethod
    def read(
        cls, folder: Path, *, variant: str | None, dtype: Dtype, use_safetensors: bool | None, **changes: Any
    ) -> Self:
        """The model in `folder`, all of one save."""

        def files() -> tuple[Any, tuple[Path, dict[str, Tensor]]]:
            config = cls.read_config(safe_join(folder, cls.config_name), **changes)
            return config, read_weights(folder, cls.stem, variant, use_safetensors)

        config, (path, tensors) = read_consistently(
            folder, [cls.config_name, *cls.stem.choose(None, None, None)], files
        )
        return cls.holding(tensors, config, folder / cls.config_name, dtype=dtype, path=path)

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | Path | Mapping[str, Tensor],
        *,
        config: str | Path | None = None,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        ema: str = "auto",
        extract_ema: bool | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **changes: Any,
    ) -> Self:
        """This part out of one `.ckpt` or safetensors file, alone or among others, in any dialect that is known.

        The file: a path, a link to one on the hub, "owner/name/file", or its tensors by name. `config`: the folder or
        hub repository of a checkpoint with the settings, where neither the file nor its neighbour `config.json` has
        them; else they are what the tensors' shapes tell, and the published ones, with a warning where these may not
        fit. `ema`: "yes" for the moving average of a UNet's weights, "no" for the weights as last trained, "auto" for
        the first if it is there; `extract_ema` says yes or no as well. The rest is as in `from_pretrained`.
        """
        from .single_file import SingleFile  # see weights/__init__.py

        hub = Hub(revision, cache_dir, local_files_only, token)
        file = SingleFile.of(pretrained_model_link_or_path_or_dict, hub)
        return cls.read_single(
            file,
            config_folder(config, hub, subfolder),
            ema=resolve_ema(ema, extract_ema),
            dtype=as_dtype(torch_dtype if dtype is None else dtype),
            **{name: value for name, value in changes.items() if name not in READING},
        )

    @classmethod
    def read_single(
        cls,
        file: SingleFile,
        config: Path | None,
        *,
        ema: str,
        dtype: Dtype,
        tell: Callable[[str], Any] = warnings.warn,
        **changes: Any,
    ) -> Self:
        """The model out of `file`; `config` is a folder with its settings, if they are not to be told by the file.

        `tell` is told of settings that are but guessed.
        """
        from .infer_config import infer_config, uninferable_warning

        held = file.part(cls.part, ema)
        settings, path = cls.settings_for(file, config) or (infer_config(held), file.path)
        if (
            path == file.path
            and cls.part not in file.settings
            and (guessed := uninferable_warning(held, {**settings, **changes}))
        ):
            tell(guessed)
        return cls.holding(
            held.tensors, cls.checked(settings, path, **changes), path, dtype=dtype, naming=held.naming, path=file.path
        )

    @classmethod
    def holding(
        cls,
        tensors: Mapping[str, Tensor],
        config: Any,
        told: Path,
        *,
        dtype: Dtype,
        naming: Naming | None = None,
        path: Path,
    ) -> Self:
        """A model in eval mode with the settings that `told` tells, holding `tensors` uncopied where they need no cast.

        It is built on the meta device, and not at all where more layers are asked for than there can be tensors for.
        """
        if (least := cls.least_tensors(config)) > min(max(len(tensors), MAX_LAYERS_TO_LIST), MAX_LAYERS):
            raise CheckpointError(
                f"asks for {least} layers or more; {path.name} has {len(tensors)} tensors, and "
                f"{MAX_LAYERS} layers are the most",
                path=told,
            )
        with torch.device("meta"), SkipInit():
            model = cls.built(config, told)
        load(model, tensors, naming=naming, path=path, dtype=dtype)
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = "10GB",
        **options: Any,
    ) -> None:
        """Write settings and weights into a folder, made if need be, as diffusers reads them.

        All of it or nothing, even if killed; `atomic/folder.py` says how, and where that cannot be. Only the main
        process of a distributed run writes. `save_function` is for code written against diffusers, and not called.
        """
        from .writing import write_weights

        filter_kwargs(options, SAVING, f"{type(self).__name__}.save_pretrained")
        if not should_write(is_main_process):
            return
        check_type("safe_serialization", safe_serialization, bool)
        with atomic_folder(as_path("save_directory", save_directory)) as new:
            super().save_pretrained(new)
            write_weights(
                new,
                self.stem,
                self.keymap.to_theirs(self.state_dict()),
                variant=variant,
                safe_serialization=safe_serialization,
                max_shard_size=max_shard_size,
            )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    def num_parameters(self, only_trainable: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)


class TransformersModel(PretrainedModel):
    """A model whose published files are in transformers' manner."""

    stem = TRANSFORMERS
    model_type: ClassVar[str]

    def config_file(self) -> Mapping[str, Any]:
        """Says float32 whatever was saved, so that diffusers loads all parts of a half-precision folder alike."""
        settings = {key: value for key, value in self.config.to_dict().items() if key != "torch_dtype"}
        return settings | {
            "architectures": [type(self).__name__],
            "model_type": self.model_type,
            "dtype": "float32",
            "transformers_version": TRANSFORMERS_FORMAT,
        }


def settings_part(part: str, file: SingleFile, config: Path | None, image_encoder: Any) -> Any:
    """A part without weights to go with those in `file`, by the settings that are found, else by the published ones."""
    from .infer_config import settings_without_weights

    size = image_encoder.config.image_size if image_encoder is not None else 224
    settings, path = first_class(part).settings_for(file, config) or (settings_without_weights(part, size), file.path)
    kind = served(part, settings.get("_class_name"), path) if part == "scheduler" else first_class(part)
    return kind.built(kind.checked(settings, path), path)
