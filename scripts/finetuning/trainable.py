"""The parameters that a stage trains, and their moving average."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

Parameters = dict[str, nn.Parameter]
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
CONSTANT = re.compile(r"\.attn2\.to_[qk]\b|\.transformer_blocks\.\d+\.norm2\.")
"""What the output does not depend on, as the context is one token, whose softmax is 1: queries and keys of
cross-attention, and their norm. Their gradients are rounding errors, which Adam would enlarge to whole steps."""


def choose_parameters(unet: nn.Module, stage: str, rank: int = 16, alpha: float | None = None) -> Parameters:
    """Return the parameters of a stage by name, the only ones that require gradients.

    "cross-attention": those of the cross-attention layers, the first stage of sd-image-variations-diffusers; "unet":
    all, its second stage; "lora": adapters of this rank (arXiv:2106.09685) of all attention layers, which are added.
    Queries and keys of cross-attention are not among them, see `CONSTANT`.
    """
    if stage == "lora":
        from peft import LoraConfig

        layers = [name for name, _ in unet.named_modules() if name.endswith(tuple(LORA_LAYERS))]
        layers = [name for name in layers if not CONSTANT.search(name)]
        config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=layers, init_lora_weights="gaussian")
        unet.add_adapter(config)  # type: ignore[operator]
    else:
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_((stage == "unet" or ".attn2." in name) and not CONSTANT.search(name))
    return trainable_parameters(unet)


def trainable_parameters(unet: nn.Module) -> Parameters:
    """Return the parameters that require gradients, by name."""
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


class MovingAverage:
    """The exponential moving average of parameters, by name, whose decay at step n is at most (1 + n) / (10 + n)."""

    def __init__(self, parameters: Parameters, decay: float):
        self.parameters, self.decay = parameters, decay
        self.means = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the values of the parameters after a step, counted from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(map(local, self.means.values())), list(map(local, self.parameters.values())), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the parameters their means in the block."""
        values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            copy_values(self.parameters, self.means)
            yield
        finally:
            copy_values(self.parameters, values)


@torch.no_grad()
def copy_values(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into tensors of the same names; those of sharded tensors may be whole."""
    if tensors.keys() != values.keys():
        raise ValueError(f"values: expected the names {sorted(tensors)}, got {sorted(values)}")
    for name, tensor in tensors.items():
        value = values[name]
        if isinstance(tensor, DTensor) and not isinstance(value, DTensor):
            value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
        tensor.copy_(value)


def local(tensor: Tensor) -> Tensor:
    """Return a tensor, of a sharded one the part on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, Tensor], is_main: bool) -> dict[str, Tensor]:
    """Return tensors on the CPU of the main rank, sharded ones whole. All ranks call it, and others get none."""
    gathered = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor)
        if is_main:
            gathered[name] = tensor.detach().cpu()
    return gathered


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor, a sharded one with its parts from all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
