"""The convolutional and pointwise layers that the UNet and the autoencoder are built of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import InputTypeError, short_repr
from ..kernels import cpu_kernels as cpu
from ..kernels import polyphase as phases
from ..kernels.autotune import autotuned
from .stock import Precomputed, is_stock, repeat_to_batch

Old = TypeVar("Old", bound=nn.Module)


class Linear(nn.Linear):
    """PyTorch's, by the quickest kernel that is here."""

    def forward(self, input: Tensor) -> Tensor:
        return cpu.linear(input, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """PyTorch's, by the quickest kernel that is here."""

    def forward(self, input: Tensor) -> Tensor:
        return cpu.conv2d(self, input)


class GroupNorm(nn.GroupNorm):
    """PyTorch's; more precise than that where a picture lies pixel by pixel."""

    def forward(self, input: Tensor) -> Tensor:
        return cpu.group_norm(self, input)


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """SiLU of the normalised x; over it in memory, where neither a gradient nor a hook has a use for it."""
    h = norm(x)
    return F.silu(h, inplace=type(norm) is GroupNorm and not norm._forward_hooks and not torch.is_grad_enabled())


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolve, twice, around an identity. The autoencoder's blocks have no clock."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, eps: float, time_dim: int = 0):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, out_channels) if time_dim else None
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def prepare(self, time: Tensor) -> Precomputed:
        return Precomputed(self.time(F.silu(time))[:, :, None, None] if self.time else None)  # b c -> b c 1 1

    def forward(self, x: Tensor, time: Tensor | Precomputed | None = None) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))
        if self.time is not None and time is not None:
            shift = (time if isinstance(time, Precomputed) else self.prepare(time)).value
            h = h + (shift if len(shift) == 1 else repeat_to_batch(shift, h))
        h = self.conv2(norm_silu(self.norm2, h))
        return self.skip(x) + h


class FeedForward(nn.Module):
    """Widen fourfold, gate with a GELU (GEGLU, arXiv:2002.05202), narrow again."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.widen = Linear(dim, 8 * dim)
        self.narrow = Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.widen(self.norm(x)).chunk(2, dim=-1)
        gate = F.gelu(gate)
        return self.narrow(x * gate if torch.is_grad_enabled() else gate.mul_(x))  # in its place: they are large


class Downsample(nn.Module):
    """Half the size by a strided convolution. The autoencoder's pads right and below only."""

    def __init__(self, channels: int, *, one_sided: bool = False):
        super().__init__()
        self.one_sided = one_sided
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=0 if one_sided else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.one_sided else x)


class Upsample(nn.Module):
    """Twice the size, or a given size, by repeating pixels, then convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        twice = 2 * x.shape[2], 2 * x.shape[3]
        if size not in (None, twice):
            return self.conv(F.interpolate(x, size, mode="nearest"))
        if cpu.fused_upsample_pays(self.conv, x):
            return cpu.upsample_conv(self.conv, x)
        conv = self.conv
        known = type(conv) is Conv2d and is_stock(conv) and phases.is_same_3x3(conv)
        ways = (self.plain, self.in_phases) if known else (self.plain,)
        return autotuned("enlarge", ways, x)

    def plain(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def in_phases(self, x: Tensor) -> Tensor:
        made = x.new_empty(len(x), len(self.conv.weight), 2 * x.shape[2], 2 * x.shape[3])
        return phases.upsample_conv_by_phases(x, phases.phase_kernels(self.conv.weight), self.conv.bias, made)


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep (arXiv:2006.11239, appendix B) through a two-layer network."""

    def __init__(self, dim: int, time_dim: int, *, cos_first: bool, shift: float):
        super().__init__()
        self.dim, self.cos_first, self.shift = dim, cos_first, shift
        self.linear1 = nn.Linear(dim, time_dim)
        self.linear2 = nn.Linear(time_dim, time_dim)

    def forward(self, t: Tensor) -> Tensor:
        return self.linear2(F.silu(self.linear1(self.sinusoids(t).to(self.linear1.weight.dtype))))  # b -> b c

    def sinusoids(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(-math.log(10000) * steps / (half - self.shift))
        waves = [angles.cos(), angles.sin()] if self.cos_first else [angles.sin(), angles.cos()]
        return F.pad(torch.cat(waves, dim=-1), (0, self.dim % 2))  # an odd width ends in a zero


class GradientCheckpointingMixin:
    """Trade time for memory in training: recompute a part's activations in the backward pass."""

    gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(getattr(part, "gradient_checkpointing", False) for part in self.modules())  # type: ignore

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the inputs of the large parts; their insides are computed again for the gradients."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False

    def run(self, part: nn.Module, *inputs: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)


class CallableSlots:
    """Attributes, named in `seams`, that may be a function now and a module with weights then, or the reverse."""

    seams: ClassVar[tuple[str, ...]] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.seams:
            if not callable(value) and not (value is None and name == "override"):
                raise InputTypeError(f"{type(self).__name__}.{name}={short_repr(value)}: a function would do", key=name)
            # nn.Module lets no function take a module's place
            vars(self).get("_modules", {}).pop(name, None)
        super().__setattr__(name, value)


def replace_layers(model: nn.Module, old: type[Old], make: Callable[[Old], nn.Module]) -> int:
    """Replace every `old` layer in `model` by `make(layer)`; returns how many there were.

    Works on loaded weights: `make` takes what it needs from the layer that it is given.
    """
    if not isinstance(model, nn.Module) or not isinstance(old, type) or not callable(make):
        raise InputTypeError(
            f"swap({type(model).__name__}, {short_repr(old)}, {short_repr(make)}): a model, a class of layers, "
            "and a function of one that returns another would do"
        )
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, old)
    ]
    for parent, name, child in found:
        made: Any = make(child)  # type: ignore[arg-type]
        if not isinstance(made, nn.Module):
            raise InputTypeError(
                f"swap: {short_repr(make)} made {short_repr(made)} of {type(child).__name__}; a layer would do"
            )
        setattr(parent, name, made)
    return len(found)
