"""The parameters that a stage trains, and their moving average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import AveragedModel

Parameters = dict[str, nn.Parameter]
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


def choose_parameters(unet: nn.Module, stage: str, rank: int = 16, alpha: float | None = None) -> Parameters:
    """Return the parameters of a stage by name, the only ones that require gradients.

    "cross-attention": those of the cross-attention layers, the first stage of sd-image-variations-diffusers; "unet":
    all, its second stage; "lora": adapters of this rank (arXiv:2106.09685) of all attention layers, which are added.
    """
    if stage == "lora":
        from peft import LoraConfig

        config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=LORA_LAYERS, init_lora_weights="gaussian")
        unet.add_adapter(config)  # type: ignore[operator]
    else:
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(stage == "unet" or ".attn2." in name)
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def moving_average(parameters: Parameters, decay: float) -> AveragedModel:
    """Return an exponential moving average of parameters, whose decay after n steps is at most (1 + n) / (10 + n)."""

    @torch.no_grad()
    def update(means: list[Tensor], values: list[Tensor], count: Tensor | int) -> None:
        weight = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        for mean, value in zip(means, values, strict=True):
            mean.lerp_(value, weight)

    return AveragedModel(nn.ParameterList(parameters.values()), multi_avg_fn=update)  # type: ignore[arg-type]


@contextmanager
def averaged_weights(parameters: Parameters, average: AveragedModel | None) -> Iterator[None]:
    """Give the parameters the values of their average in the block."""
    if average is None:
        yield
        return
    current = [parameter.detach().clone() for parameter in parameters.values()]
    try:
        copy_values(parameters, list(average.module.parameters()))
        yield
    finally:
        copy_values(parameters, current)


@torch.no_grad()
def copy_values(parameters: Parameters, values: Any) -> None:
    """Copy values into parameters; those of sharded parameters may be whole tensors."""
    for parameter, value in zip(parameters.values(), values, strict=True):
        if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
            value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        parameter.copy_(value)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, a sharded one gathered from all ranks."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()
