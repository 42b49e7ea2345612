"""The UNet's levels: down, in the middle, and up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class UNetBlock(nn.Module):
    """One resolution: resnet blocks, each followed by a transformer where the level has any.

    `time` and `context` are lists: what each resnet block and each transformer is told of them.
    """

    def __init__(self, resnets: list[nn.Module], transformers: list[nn.Module], resample: nn.Module | None = None):
        super().__init__()
        self.resnets, self.transformers = nn.ModuleList(resnets), nn.ModuleList(transformers)
        self.resample = resample

    def layer(self, i: int, x: Tensor, time: list[Any], context: list[Any]) -> Tensor:
        x = self.resnets[i](x, time[i])
        return self.transformers[i](x, context[i]) if i < len(self.transformers) else x


class DownBlock(UNetBlock):
    def forward(self, x: Tensor, time: list[Any], context: list[Any]) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time, context)
            skips.append(x)
        if self.resample is not None:
            x = self.resample(x)
            skips.append(x)
        return x, skips


class MidBlock(UNetBlock):
    def forward(self, x: Tensor, time: list[Any], context: list[Any]) -> Tensor:
        x = self.layer(0, x, time, context)
        return self.resnets[1](x, time[1])


class UpBlock(UNetBlock):
    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        time: list[Any],
        context: list[Any],
        join: Callable[[Tensor, Tensor], Tensor],
        size: tuple[int, int] | None,
    ) -> Tensor:
        for i, skip in enumerate(skips):
            x = self.layer(i, join(x, skip), time, context)
        return x if self.resample is None else self.resample(x, size)
