"""Tensors into a model: under which names they come, and whether they are the ones that it has places for."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..checks import Dtype
from ..errors import CheckpointError
from .keymap import PUBLISHED, Dialect, Naming

if TYPE_CHECKING:
    from .pretrained import PretrainedModel

OURS = Naming(Dialect.OURS)


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
