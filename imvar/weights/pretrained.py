"""`from_pretrained` and `save_pretrained`, for parts with weights and for parts without."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..checks import as_dtype
from ..config import Configured
from ..errors import CheckpointError, InputError, InputTypeError
from .files import Hub, inside, locate, read_json, within, write_text
from .keymap import Keymap
from .reading import read_weights
from .stems import DIFFUSERS, TRANSFORMERS, Stem
from .writing import write_weights

FORMAT = "0.42.1"  # the diffusers version whose file format is written; readers branch on it
TRANSFORMERS_FORMAT = "5.23.0"
FEW, MOST = 100, 1000  # layers: so few are built, to name the tensors that a file lacks for them; so many never are


class Pretrained(Configured):
    """A part whose settings live in a file of their own."""

    config_name: ClassVar[str] = "config.json"

    @classmethod
    def from_pretrained(cls, source: str | Path, *, subfolder: str | None = None, revision: str | None = None,
                        cache_dir: str | Path | None = None, local_files_only: bool = False,
                        token: str | bool | None = None, **changes: Any) -> Self:
        """Read settings from a folder or a hub repository; `changes` come on top.

        `subfolder` is part of what the caller names, as if `source` ended in it. Raises `CheckpointError` for a file
        that is missing or holds what this part cannot honour.
        """
        name = f"{subfolder}/{cls.config_name}" if subfolder else cls.config_name
        folder = locate(source, Hub(revision, cache_dir, local_files_only, token), lambda names: [name])
        path = inside(folder / (subfolder or ""), cls.config_name)
        return cls.built(cls.read_config(path, **changes), path)

    @classmethod
    def read_config(cls, path: Path, **changes: Any) -> Any:
        """The settings in `path`, checked; `changes` are checked as constructor arguments are."""
        known = [f.name for f in fields(cls.config_class)]
        changes = cls.config_class.of(**asked_for(changes, known, f"{cls.__name__}.from_pretrained")).explicit()
        settings = read_json(path)
        try:
            return cls.config_class.read(settings, **changes)
        except InputError as error:
            raise CheckpointError(str(error), path=path, key=error.key) from error

    @classmethod
    def built(cls, config: Any, path: Path) -> Self:
        """A part with the settings that `path` holds, or a `CheckpointError` for those that do not go together."""
        try:
            return cls(config)
        except InputError as error:
            raise CheckpointError(str(error), path=path, key=error.key) from error

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write the settings into `folder`, made if need be, in the published format."""
        text = json.dumps(self.config_file(), indent=2, sort_keys=True) + "\n"
        write_text(Path(folder) / self.config_name, text)

    def config_file(self) -> Mapping[str, Any]:
        """What the settings file says: the settings, and who wrote them in which format."""
        return self.config.to_dict() | {"_class_name": type(self).__name__, "_diffusers_version": FORMAT}


class PretrainedModel(Pretrained, nn.Module):
    """A model: settings, weights, and the table that knows what files call its weights."""

    stem: ClassVar[Stem] = DIFFUSERS

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.register_load_state_dict_pre_hook(take_published_names)

    @property
    def keymap(self) -> Keymap:
        """The dictionary between our names and the published ones."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, source: str | Path, *, subfolder: str | None = None, revision: str | None = None,
                        variant: str | None = None, torch_dtype: torch.dtype | str | None = None,
                        dtype: torch.dtype | str | None = None, use_safetensors: bool | None = None,
                        cache_dir: str | Path | None = None, local_files_only: bool = False,
                        token: str | bool | None = None, low_cpu_mem_usage: bool = True, **changes: Any) -> Self:
        """Read settings and weights from a folder or a hub repository; `changes` of settings come on top.

        Weights are float32 unless another `dtype` is named ("auto": as in the file), and are mapped from the
        file where they need no conversion, whatever `low_cpu_mem_usage` says. The model is in eval mode.
        Raises `CheckpointError` naming the file, and the tensor that is missing, unknown or misshapen.
        """
        wanted_dtype = as_dtype(torch_dtype if dtype is None else dtype)
        prefix = f"{subfolder}/" if subfolder else ""

        def wanted(names: set[str] | None) -> list[str]:
            files = cls.stem.choose(within(names, prefix), variant, use_safetensors)
            return [prefix + name for name in (cls.config_name, *files)]

        folder = locate(source, Hub(revision, cache_dir, local_files_only, token), wanted) / prefix
        return cls.read(folder, variant=variant, dtype=wanted_dtype, use_safetensors=use_safetensors, **changes)

    @classmethod
    def least_tensors(cls, config: Any) -> int:
        """How many tensors a model with these settings has at the least, told without building it."""
        return 0

    @classmethod
    def read(cls, folder: Path, *, variant: str | None, dtype: torch.dtype | None, use_safetensors: bool | None,
             **changes: Any) -> Self:
        """Build the model on the meta device and give it the weights in `folder`."""
        settings = inside(folder, cls.config_name)
        config = cls.read_config(settings, **changes)
        path, tensors = read_weights(folder, cls.stem, variant, use_safetensors)
        if (least := cls.least_tensors(config)) > min(max(len(tensors), FEW), MOST):
            raise CheckpointError(f"asks for {least} layers or more; {path.name} has {len(tensors)} tensors, and "
                                  f"{MOST} layers are the most", path=settings)
        with torch.device("meta"):
            model = cls.built(config, settings)
        load(model, tensors, path=path, dtype=dtype)
        return model.eval()

    def save_pretrained(self, folder: str | Path, *, safe_serialization: bool = True, variant: str | None = None,
                        max_shard_size: int | str = "10GB", **_: Any) -> None:
        """Write settings and weights into `folder`, made if need be, as diffusers reads them."""
        super().save_pretrained(folder)
        write_weights(Path(folder), self.stem, self.keymap.to_theirs(self.state_dict()), variant=variant,
                      safe_serialization=safe_serialization, max_shard_size=max_shard_size)

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
        return settings | {"architectures": [type(self).__name__], "model_type": self.model_type, "dtype": "float32",
                           "transformers_version": TRANSFORMERS_FORMAT}


def load(model: PretrainedModel, tensors: Mapping[str, Tensor], *, path: Path | None = None,
         dtype: torch.dtype | None = None) -> None:
    """Load `tensors`, named as published (now or earlier) or as ours, into `model`.

    A model on the meta device takes them as they are, or in another `dtype`; any other copies them. Raises
    `CheckpointError` naming the tensors that are missing, unknown or misshapen; nothing is loaded then.
    """
    expected = model.state_dict()
    found = dict(tensors) if tensors.keys() == expected.keys() else model.keymap.to_ours(tensors, expected, path)
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"is of {tensor.dtype}; floating numbers are needed", path=path,
                                  key=model.keymap.spellings(name)[0])
        if tensor.shape != expected[name].shape:
            raise CheckpointError(f"has shape {tuple(tensor.shape)} in the file, {tuple(expected[name].shape)} by the "
                                  "config", path=path, key=model.keymap.spellings(name)[0])
    found = {name: cast(tensor, dtype) for name, tensor in found.items()}
    model.load_state_dict(found, strict=True, assign=any(tensor.is_meta for tensor in expected.values()))
    if left := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise CheckpointError("is a buffer that files do not hold (persistent=False), so loading cannot fill it: "
                              "compute it in forward, or let it be saved", path=path, key=left[0])


def asked_for(options: Mapping[str, Any], known: Container[str], where: str) -> dict[str, Any]:
    """The known ones of `options`. One that is unknown may be there only to say None or False: diffusers has many."""
    odd = {name for name, value in options.items() if name not in known and value is not None and value is not False}
    if odd:
        raise InputTypeError(f"{where}: {min(odd)!r} is no part, setting or option here; leave it out")
    return {name: value for name, value in options.items() if name in known}


def take_published_names(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before `load_state_dict`, of the model or of one that it is a part of: published names become ours."""
    assert isinstance(model, PretrainedModel)
    theirs = {name.removeprefix(prefix): state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
    ours = model.keymap.renamed(theirs, model.state_dict())
    state_dict.update({f"{prefix}{name}": tensor for name, tensor in ours.items()})


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

