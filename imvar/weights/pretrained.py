"""Models: `from_pretrained`, `from_single_file`, `save_pretrained`, and loading tensors into a model."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..atomic.folder import atomic_folder, read_consistently
from ..checks import Dtype, as_dtype, as_path, check_type
from ..errors import CheckpointError
from .configured import ConfiguredComponent
from .filenames import DIFFUSERS, TRANSFORMERS, WeightsName
from .hub import Hub, locate, within
from .json_files import safe_join
from .keymap import PUBLISHED, Dialect, Keymap, Naming
from .options import READ_OPTIONS, SAVE_OPTIONS, filter_kwargs, locate_config, resolve_ema, should_write
from .reading import read_weights

if TYPE_CHECKING:
    from .single_file import SingleFile

TRANSFORMERS_FORMAT = "5.23.0"
MAX_LAYERS_TO_LIST, MAX_LAYERS = (
    100,
    1000,
)  # layers: so few are built, to name the tensors that a file lacks for them; so many never are
OURS = Naming(Dialect.OURS)


class PretrainedModel(ConfiguredComponent, nn.Module):
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
    def min_tensor_count(cls, config: Any) -> int:
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
        return cls.from_tensors(tensors, config, folder / cls.config_name, dtype=dtype, path=path)

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
        file = SingleFile.from_source(pretrained_model_link_or_path_or_dict, hub)
        return cls.from_single(
            file,
            locate_config(config, hub, subfolder),
            ema=resolve_ema(ema, extract_ema),
            dtype=as_dtype(torch_dtype if dtype is None else dtype),
            **{name: value for name, value in changes.items() if name not in READ_OPTIONS},
        )

    @classmethod
    def from_single(
        cls,
        file: SingleFile,
        config: Path | None,
        *,
        ema: str,
        dtype: Dtype,
        warn: Callable[[str], Any] = warnings.warn,
        **changes: Any,
    ) -> Self:
        """The model out of `file`; `config` is a folder with its settings, if they are not to be told by the file.

        `warn` is told of settings that are but guessed.
        """
        from .infer_config import infer_config, uninferable_warning

        held = file.part(cls.part, ema)
        settings, path = cls.settings_for(file, config) or (infer_config(held), file.path)
        if (
            path == file.path
            and cls.part not in file.settings
            and (guessed := uninferable_warning(held, {**settings, **changes}))
        ):
            warn(guessed)
        return cls.from_tensors(
            held.tensors,
            cls.validate_config(settings, path, **changes),
            path,
            dtype=dtype,
            naming=held.naming,
            path=file.path,
        )

    @classmethod
    def from_tensors(
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
        if (least := cls.min_tensor_count(config)) > min(max(len(tensors), MAX_LAYERS_TO_LIST), MAX_LAYERS):
            raise CheckpointError(
                f"asks for {least} layers or more; {path.name} has {len(tensors)} tensors, and "
                f"{MAX_LAYERS} layers are the most",
                path=told,
            )
        with torch.device("meta"), SkipInit():
            model = cls.build(config, told)
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

        filter_kwargs(options, SAVE_OPTIONS, f"{type(self).__name__}.save_pretrained")
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

    def saved_config(self) -> Mapping[str, Any]:
        """Says float32 whatever was saved, so that diffusers loads all parts of a half-precision folder alike."""
        settings = {key: value for key, value in self.config.to_dict().items() if key != "torch_dtype"}
        return settings | {
            "architectures": [type(self).__name__],
            "model_type": self.model_type,
            "dtype": "float32",
            "transformers_version": TRANSFORMERS_FORMAT,
        }


def load(
    model: PretrainedModel,
    tensors: Mapping[str, Tensor],
    *,
    naming: Naming | None = None,
    path: Path | None = None,
    dtype: Dtype = None,
) -> None:
    """Load `tensors`, named as published (now or earlier), as ours, or as `naming` says, into `model`.

    A model on the meta device takes them as they are, or in another `dtype` ("auto": all in the widest there is); any
    other copies them. Raises
    `CheckpointError` naming the tensors that are missing, unknown or misshapen; nothing is loaded then.
    """
    expected = model.state_dict()
    if naming is None:
        naming = OURS if tensors.keys() == expected.keys() else PUBLISHED
    try:
        found = model.keymap.to_ours(tensors, expected, naming, path)
    except CheckpointError as error:
        from .single_file import detect_part  # see weights/__init__.py

        other = detect_part(tensors)
        if other is None or other[0] == model.part:
            raise
        reason = f"{error.reason}; these look like the weights of another part, the {other[0]}"
        raise CheckpointError(reason, path=path, key=error.key) from None
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"is of {tensor.dtype}; floating numbers are needed",
                path=path,
                key=model.keymap.sources(name, naming)[0].name,
            )
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"has shape {tuple(tensor.shape)} in the file, {tuple(expected[name].shape)} by the config",
                path=path,
                key=model.keymap.sources(name, naming)[0].name,
            )
    if dtype == "auto":
        dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in found.values()})
    found = {name: cast(tensor, dtype) for name, tensor in found.items()}
    model.load_state_dict(found, strict=True, assign=any(tensor.is_meta for tensor in expected.values()))
    if left := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise CheckpointError(
            "is a buffer that files do not hold (persistent=False), so loading cannot fill it: "
            "compute it in forward, or let it be saved",
            path=path,
            key=left[0],
        )


class SkipInit(TorchFunctionMode):
    """In here the functions of `torch.nn.init` do nothing: what they would set is about to be loaded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def rename_published_keys(model: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before `load_state_dict`, of the model or of one that it is a part of: published names become ours."""
    theirs = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    expected = model.state_dict()
    if theirs.keys() == expected.keys():  # they are ours
        return
    for name in theirs:
        del state_dict[prefix + name]
    ours = model.keymap.renamed(theirs, expected)
    state_dict.update({f"{prefix}{name}": tensor for name, tensor in ours.items()})


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
