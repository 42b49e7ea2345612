"""Models: `from_pretrained`, `from_single_file`, `save_pretrained`, and loading tensors into a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..atomic.folder import atomic_folder, read_consistently
from ..checks import Dtype, as_path, check_type
from ..errors import CheckpointError, InputError, invalid, short_repr, warn_user
from .configured import ConfiguredComponent
from .filenames import DIFFUSERS, TRANSFORMERS, WeightsName
from .hub import locate, names_in
from .json_files import safe_join
from .keymap import PUBLISHED, Keymap, Naming
from .mapped import MappedFiles
from .options import (
    READ_OPTIONS,
    SAVE_OPTIONS,
    filter_kwargs,
    loading_options,
    locate_config,
    resolve_dtype,
    resolve_ema,
    should_write,
)
from .origin import Origin, WeightsFile, layers_of, origin_of, state_of
from .read_errors import explain_read_error
from .reading import IN_MEMORY, read_weights, weights_files

if TYPE_CHECKING:
    from .single_file import SingleFile

TRANSFORMERS_VERSION = "5.23.0"  # whose config format is written
MAX_LAYERS = 1000  # of any model
MAX_LAYERS_TO_LIST = 100  # up to which a model is built even for fewer tensors, to name the ones that are missing


class PretrainedModel(ConfiguredComponent, nn.Module):
    """A model: config, weights, and the keymap between its parameter names and those in files."""

    weights_name: ClassVar[WeightsName] = DIFFUSERS
    _origin: Origin | None = None  # where the weights come from, if they were loaded from a file

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.register_load_state_dict_pre_hook(modernize_keys)

    @property
    def keymap(self) -> Keymap:
        """The translation between this model's parameter names and those in files."""
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
        """Load a model from a folder, a hub repository or a bundled checkpoint; `changes` replace config fields.

        Weights become float32 or `dtype` ("auto": the widest dtype in the file; bfloat16 if all have 8 bits). They are
        memory-mapped where they need no conversion, so the file must not be rewritten in place while they are in use;
        `disable_mmap` reads it into memory. `low_cpu_mem_usage=False` has no effect. The model is in eval mode. With
        `output_loading_info=True` the result is a tuple: the model, and empty collections of the tensors that diffusers
        or transformers would report. Raises `CheckpointError` naming the file, and the tensor that is missing, unknown,
        misshapen or has values beyond `dtype`.
        """
        weights_dtype = resolve_dtype(torch_dtype, dtype)
        prefix = f"{subfolder}/" if check_type("subfolder", subfolder, str) else ""
        check_type("low_cpu_mem_usage", low_cpu_mem_usage, bool)
        check_type("disable_mmap", disable_mmap, bool)

        def allow_patterns(names: set[str] | None) -> list[str]:
            files = cls.weights_name.select(names_in(names, prefix), variant, use_safetensors)
            return [prefix + name for name in (cls.config_name, *files)]

        with_info = check_type("output_loading_info", changes.get("output_loading_info"), bool)
        hub, changes = loading_options(changes, revision, cache_dir, local_files_only, token)
        folder = locate(pretrained_model_name_or_path, hub, allow_patterns) / prefix
        model = cls.read(
            folder,
            variant=variant,
            dtype=weights_dtype,
            use_safetensors=use_safetensors,
            disable_mmap=disable_mmap,
            **changes,
        )
        model.note_revision(revision)
        return (model, cls.loading_info()) if with_info else model  # type: ignore

    @classmethod
    def loading_info(cls) -> dict[str, Any]:
        """Return what diffusers reports about a load without errors."""
        return {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}

    @classmethod
    def min_tensor_count(cls, config: Any) -> int:
        """Return a lower bound of the number of tensors of a model with this config, without building it."""
        return 0

    @classmethod
    def read(
        cls,
        folder: Path,
        *,
        variant: str | None,
        dtype: Dtype,
        use_safetensors: bool | None,
        disable_mmap: bool,
        **changes: Any,
    ) -> Self:
        """Load the model in `folder`, with config and weights of the same save."""

        def read_files() -> tuple[Any, tuple[Path, dict[str, Tensor]], list[WeightsFile]]:
            config = cls.read_config(safe_join(folder, cls.config_name), **changes)
            path, tensors = read_weights(folder, cls.weights_name, variant, use_safetensors, disable_mmap)
            files = [WeightsFile.stamped(f"{cls.part}/{file.name}", file) for file in weights_files(path)]
            return config, (path, tensors), files

        patterns = [cls.config_name, *cls.weights_name.select(None, None, None)]
        with explain_read_error(folder):
            config, (path, tensors), files = read_consistently(folder, patterns, read_files)
        model = cls.from_tensors(tensors, config, folder / cls.config_name, dtype=dtype, path=path)
        model._origin = origin_of(model, folder, files, widest_dtype([tensor.dtype for tensor in tensors.values()]))
        return model

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
        disable_mmap: bool = False,
        **changes: Any,
    ) -> Self:
        """Load a model from a `.ckpt` or safetensors file with its weights and maybe others, in any known dialect.

        The file: a path, a hub link, "owner/name/file", or a dictionary of its tensors. `config`: the folder or hub
        repository of a checkpoint to take the config from. Without it, the config is that in the file's metadata, or
        the `config.json` next to a file of this model alone; else it is inferred from tensor shapes and filled from
        the published checkpoint, with a warning where that may be wrong. `ema`: load the UNet's moving average
        ("yes"), the raw weights ("no"), or the average if there is one ("auto"); `extract_ema` is diffusers' form of
        it. The rest is as in `from_pretrained`.
        """
        from .single_file import SingleFile  # imported here to keep `import imvar` fast

        hub, changes = loading_options(changes, revision, cache_dir, local_files_only, token)
        check_type("disable_mmap", disable_mmap, bool)
        file = SingleFile.from_source(pretrained_model_link_or_path_or_dict, hub, disable_mmap)
        return cls.from_single(
            file,
            locate_config(config, hub, subfolder),
            ema=resolve_ema(ema, extract_ema),
            dtype=resolve_dtype(torch_dtype, dtype),
            **{name: value for name, value in changes.items() if name not in READ_OPTIONS},
        )

    @classmethod
    def from_single(
        cls,
        file: SingleFile,
        folder: Path | None,
        *,
        ema: str,
        dtype: Dtype,
        warn: Callable[[str], Any] = warn_user,
        **changes: Any,
    ) -> Self:
        """Load this model from `file`, with the config in `folder` if one is given.

        `warn` is called with a message if config fields are assumed that neither a config nor a tensor determines.
        """
        from .infer_config import infer_config, uninferable_warning  # imported here to keep `import imvar` fast

        part = file.part_tensors(cls.part, ema)
        settings, path = cls.config_for(file, folder) or (infer_config(part), file.path)
        is_inferred = path == file.path and cls.part not in file.configs
        if is_inferred and (message := uninferable_warning(part, {**settings, **changes})):
            warn(message)
        config = cls.validate_config(settings, path, **changes)
        model = cls.from_tensors(part.tensors, config, path, dtype=dtype, naming=part.naming, path=file.path)
        if file.path is not IN_MEMORY:
            stored = widest_dtype([tensor.dtype for tensor in part.tensors.values()])
            files = [WeightsFile.stamped(file.path.name, file.path)]
            has_both = len(file.parts.get(cls.part, ())) > 1
            is_average = part.naming.prefix.startswith("model_ema") if has_both else None
            model._origin = origin_of(model, file.path, files, stored, ema=is_average)
        return model

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        config: Any,
        config_path: Path,
        *,
        dtype: Dtype,
        naming: Naming = PUBLISHED,
        path: Path,
    ) -> Self:
        """Build the model on the meta device, in eval mode, and assign `tensors`, without a copy unless cast.

        A config with far more layers than there are tensors is refused first. `config_path` and `path` are the files
        of the config and of the tensors, for errors.
        """
        layers, limit = cls.min_tensor_count(config), min(max(len(tensors), MAX_LAYERS_TO_LIST), MAX_LAYERS)
        if layers > limit:
            expected = f"at most {limit} layers, as {path.name} has {len(tensors)} tensors"
            raise invalid(CheckpointError, config_path, expected, f"{layers} or more")
        with torch.device("meta"), SkipInit():
            model = cls.build(config, config_path)
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
        state_dict: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Write config and weights into a folder, which is created if needed, in diffusers' format.

        The write is atomic, even if the process is killed; `atomic/folder.py` explains how, and where it cannot be.
        In a distributed run, only the main process writes. `save_function` is diffusers' and has no effect.
        `state_dict`: tensors to write in place of the model's, such as `accelerator.get_state_dict(unet)`. Raises
        `InputError` if their names are not those of the model.
        """
        from .writing import write_weights  # imported here to keep `import imvar` fast

        filter_kwargs(options, SAVE_OPTIONS, f"{type(self).__name__}.save_pretrained")
        if not should_write(is_main_process):
            return
        check_type("safe_serialization", safe_serialization, bool)
        weights = self.weights_to_save()
        if state_dict is not None:
            if wrong := weights.keys() ^ dict(state_dict).keys():
                raise invalid(InputError, "state_dict", "a tensor for each name of the model's", short_repr(min(wrong)))
            weights = dict(state_dict)
        with atomic_folder(as_path("save_directory", save_directory)) as new:
            super().save_pretrained(new)
            write_weights(
                new,
                self.weights_name,
                self.keymap.to_file(weights),
                variant=variant,
                safe_serialization=safe_serialization,
                max_shard_size=max_shard_size,
            )

    def weights_to_save(self) -> dict[str, Tensor]:
        """Return the tensors that `save_pretrained` writes, by parameter name without what compiled layers add."""
        return {name.replace("_orig_mod.", ""): tensor for name, tensor in self.state_dict().items()}

    def note_revision(self, revision: str | None) -> None:
        """Note the revision that was asked for when these weights were loaded."""
        if self._origin is not None and revision is not None:
            self._origin = replace(self._origin, revision=revision)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **options: Any) -> Self:
        """Where the weights are those that were loaded, let them count as such after they were moved or cast."""
        origin = self._origin
        is_unchanged = origin is not None and origin.has_state_of(layers_of(self))
        super()._apply(fn, *args, **options)
        if origin is not None and is_unchanged:
            self._origin = origin.moved(layers_of(self))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes, with whether the weights are those that were loaded."""
        origin = self._origin
        if origin is None or origin.has_state_of(layers_of(self)):
            return dict(vars(self))
        return vars(self) | {"_origin": replace(origin, state=None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._origin is not None and self._origin.state is not None:  # of the model that this is a copy of
            self._origin = replace(self._origin, state=state_of(layers_of(self)))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Return the number of parameter values, or of those that require a gradient."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)


class TransformersModel(PretrainedModel):
    """A model whose published files follow transformers."""

    weights_name = TRANSFORMERS
    model_type: ClassVar[str]
    __getattr__: Any = nn.Module.__getattr__  # without the entries of the config

    @classmethod
    def loading_info(cls) -> dict[str, Any]:
        """Return what transformers reports about a load without errors."""
        return {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}

    def saved_config(self) -> Mapping[str, Any]:
        """Return the content of the config file.

        Its dtype is float32 for any weights, so that diffusers loads all parts of a half-precision folder with the
        same dtype.
        """
        settings = {key: value for key, value in self.config.to_dict().items() if key != "torch_dtype"}
        return settings | {
            "architectures": [type(self).__name__],
            "model_type": self.model_type,
            "dtype": "float32",
            "transformers_version": TRANSFORMERS_VERSION,
        }


def load(
    model: PretrainedModel,
    tensors: Mapping[str, Tensor],
    *,
    naming: Naming = PUBLISHED,
    path: Path | None = None,
    dtype: Dtype = None,
) -> None:
    """Load `tensors` into `model`, named as published (now or earlier), as in `state_dict()`, or by `naming`.

    A model on the meta device takes the tensors themselves, or casts to `dtype` (see `widest_dtype` for "auto"); any
    other copies them. Raises `CheckpointError` for missing, unknown or misshapen tensors and for values that `dtype`
    cannot hold, before anything is loaded.
    """
    expected, keymap = model.state_dict(), model.keymap
    try:
        values = keymap.from_file(tensors, expected, naming, path)
    except CheckpointError as error:
        from .single_file import detect_part  # imported here to keep `import imvar` fast

        other = detect_part(tensors)
        if other is None or other[0] == model.part:
            raise
        got = f"those of the {other[0]} ({error.reason})"
        raise invalid(CheckpointError, path, f"weights of the {model.part}", got, key=error.key) from None
    keys = {name: source.name for name in values if (source := keymap.find_source(name, naming, tensors))}
    for name, tensor in values.items():
        key, shape = keys[name], tuple(expected[name].shape)
        if not tensor.is_floating_point() or tensor.dtype == torch.float4_e2m1fn_x2:  # which has two values in a byte
            raise invalid(CheckpointError, path, "floating-point values", str(tensor.dtype), key=key)
        if tensor.shape != shape:
            raise invalid(CheckpointError, path, f"shape {shape} by the config", str(tuple(tensor.shape)), key=key)
    if dtype == "auto":
        dtype = widest_dtype({tensor.dtype for tensor in values.values()})
    if dtype is not None:
        mapped = MappedFiles(weights_files(path) if path else ())
        with explain_read_error(path):
            for name, tensor in values.items():
                values[name] = cast(tensor, dtype, path, keys[name])
                if values[name] is not tensor:
                    mapped.return_pages(tensor)
    model.load_state_dict(values, strict=True, assign=any(tensor.is_meta for tensor in expected.values()))
    if unfilled := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        hint = "compute it in forward, or make it persistent"
        raise invalid(CheckpointError, path, "persistent buffers", "one with persistent=False", hint, key=unfilled[0])


class SkipInit(TorchFunctionMode):
    """Skip the functions of `torch.nn.init`, whose results loading would overwrite."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def modernize_keys(model: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before `load_state_dict` of the model, or of one that contains it: replace older names by the current ones."""
    tensors = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    names = model.state_dict()
    if tensors.keys() == names.keys():
        return
    for key in tensors:
        del state_dict[prefix + key]
    state_dict.update({prefix + name: value for name, value in model.keymap.modernize(tensors, names).items()})


def widest_dtype(dtypes: Collection[torch.dtype]) -> torch.dtype:
    """Return the dtype for `dtype="auto"`: the narrowest that holds all values and that layers compute in.

    8-bit floats are for storage alone, so it is bfloat16 if there is nothing else.
    """
    return functools.reduce(torch.promote_types, [d for d in dtypes if d.itemsize > 1] or [torch.bfloat16])


def cast(tensor: Tensor, dtype: torch.dtype, path: Path | None, key: str) -> Tensor:
    """Return a floating-point tensor in `dtype`; raise `CheckpointError` if a finite value would become infinite.

    Only a cast to a dtype of smaller range reads the values again. Values that are not finite are kept.
    """
    result = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and tensor.numel():
        is_finite = all(bound.isfinite() for bound in result.aminmax())
        if not is_finite and (lost := result.isinf() & tensor.isfinite()).any():
            expected, got = f"values that {dtype} can hold", f"{tensor[lost][0].item():g}"
            raise invalid(CheckpointError, path, expected, got, f"load with {tensor.dtype}", key=key)
    return result
