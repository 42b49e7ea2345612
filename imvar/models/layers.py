"""The convolutional and pointwise layers of the UNet and the autoencoder, and what models share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checks import FLOAT_DTYPES, check_type
from ..errors import InputError, InputTypeError, invalid, short_repr
from .conditioning import Precomputed, repeat_to_batch
from .ops import Conv2d, GroupNorm, Linear, add_conv, gelu_gate, norm_act, upsample_conv
from .stock import IMVAR, top_package

Old = TypeVar("Old", bound=nn.Module)


class UnreadAttributes:
    """Refuses to set the attributes that change the output of diffusers' layers and that these layers do not read.

    `unread_` maps their names to a hint. A subclass outside of imvar may give them a meaning.
    """

    unread_: ClassVar[Mapping[str, str]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.unread_ and top_package(type(self)) == IMVAR:
            where, expected = f"{type(self).__name__}.{name}", "an attribute that this layer reads"
            raise invalid(InputError, where, expected, short_repr(value), self.unread_[name])
        super().__setattr__(name, value)


class ResnetBlock(UnreadAttributes, nn.Module):
    """Norm, SiLU, convolution, twice, around a residual. The autoencoder's blocks take no timestep embedding."""

    fixed: ClassVar[Mapping[str, Any]] = {
        "upsample": None,
        "downsample": None,
        "time_embedding_norm": "default",
        "output_scale_factor": 1.0,
        "skip_time_act": False,
    }
    unread_ = dict.fromkeys(fixed, "replace its forward, or the layer by replace_layers")

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, eps: float, time_dim: int = 0):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels) if time_dim else None
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(0.0)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = nn.SiLU()
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        vars(self).update(self.fixed)  # for a forward of one's own, as written for diffusers' layer

    def precompute(self, temb: Tensor) -> Precomputed:
        """Project timestep embeddings (n, time_dim) to shifts (n, out_channels, 1, 1)."""
        return Precomputed(self.project(temb) if self.time_emb_proj is not None else None)

    def project(self, temb: Tensor) -> Tensor:
        return self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]  # type: ignore[misc]

    def forward(self, input_tensor: Tensor, temb: Tensor | Precomputed | None = None) -> Tensor:
        """(b, in_channels, h, w) and an embedding (b, time_dim) to (b, out_channels, h, w)."""
        h = self.conv1(norm_act(self.norm1, self.nonlinearity, input_tensor))
        if self.time_emb_proj is not None and temb is not None:
            shift = temb.value if isinstance(temb, Precomputed) else self.project(temb)
            h = h + (shift if shift.shape[0] == 1 else repeat_to_batch(shift, h))
        h = norm_act(self.norm2, self.nonlinearity, h)  # frees that of the first half before the convolution allocates
        shortcut, x = self.conv_shortcut, input_tensor
        return add_conv(self.conv2, self.dropout(h), lambda: x if shortcut is None else shortcut(x))


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another (arXiv:2002.05202)."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.proj = Linear(dim, 2 * out_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return gelu_gate(*self.proj(hidden_states).chunk(2, dim=-1))


class FeedForward(nn.Module):
    """Widen fourfold with GEGLU, then project back."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(0.0), Linear(4 * dim, dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.net(hidden_states)


class Downsample(nn.Module):
    """Halve the size with a strided convolution. The autoencoder's pads right and bottom only."""

    def __init__(self, channels: int, *, one_sided: bool = False):
        super().__init__()
        self.one_sided = one_sided
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=0 if one_sided else 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)) if self.one_sided else hidden_states)


class Upsample(nn.Module):
    """Double the size, or resize to `output_size`, by nearest neighbour, then convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        if output_size not in (None, (2 * hidden_states.shape[2], 2 * hidden_states.shape[3])):
            return self.conv(F.interpolate(hidden_states, output_size, mode="nearest"))
        return upsample_conv(self.conv, hidden_states)


class Timesteps(nn.Module):
    """Sinusoidal embedding of the timestep (arXiv:2006.11239, appendix B)."""

    def __init__(self, num_channels: int, flip_sin_to_cos: bool, downscale_freq_shift: float):
        super().__init__()
        self.num_channels, self.flip_sin_to_cos = num_channels, flip_sin_to_cos
        self.downscale_freq_shift = downscale_freq_shift

    def forward(self, timesteps: Tensor) -> Tensor:
        """(n,) to (n, num_channels) in float32."""
        half = self.num_channels // 2
        exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps[:, None].float() * torch.exp(exponents / (half - self.downscale_freq_shift))
        waves = [angles.cos(), angles.sin()] if self.flip_sin_to_cos else [angles.sin(), angles.cos()]
        return F.pad(torch.cat(waves, dim=-1), (0, self.num_channels % 2))  # an odd width ends in a zero


class TimestepEmbedding(nn.Module):
    """Two linear layers over the sinusoidal embedding."""

    def __init__(self, in_channels: int, time_embed_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, sample: Tensor, condition: None = None) -> Tensor:
        """(n, in_channels) to (n, time_embed_dim)."""
        refuse_unsupported("TimestepEmbedding", condition=condition)
        return self.linear_2(self.act(self.linear_1(sample)))


class GradientCheckpointingMixin:
    """Trade compute for memory in training: recompute the activations of large modules in the backward pass."""

    gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())  # type: ignore

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the inputs of the large modules; recompute their activations for the gradients."""
        self._set_gradient_checkpointing(True)

    def disable_gradient_checkpointing(self) -> None:
        self._set_gradient_checkpointing(False)

    def _set_gradient_checkpointing(self, value: bool) -> None:
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, GradientCheckpointingMixin):
                module.gradient_checkpointing = value

    def maybe_checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, **kwargs)
        return function(*args, **kwargs)


class CallableSlots:
    """Attributes, named in `slots_`, that hold a function or a module with weights; `backend` may also be None."""

    slots_: ClassVar[tuple[str, ...]] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.slots_:
            if not callable(value) and not (value is None and name == "backend"):
                raise invalid(
                    InputTypeError, f"{type(self).__name__}.{name}", "a function", short_repr(value), key=name
                )
            vars(self).get("_modules", {}).pop(name, None)  # nn.Module lets no function replace a module
        super().__setattr__(name, value)
        if name in self.slots_ and isinstance(value, nn.Module) and hasattr(type(self), name):
            vars(self)[name] = value  # Python finds a class's own before nn.Module looks into its modules


def refuse_unsupported(owner: str, **arguments: Any) -> None:
    """Raise `InputError` for arguments of the reference that this model has no use for, unless they are None."""
    for name, value in arguments.items():
        if value is not None and not (isinstance(value, Mapping) and not value):
            raise invalid(InputError, name, "None", short_repr(value), f"{owner} does not support it")


class Replacement(int):
    """In how many places layers or kernels were replaced; `undo()` puts the previous ones back."""

    previous: list[tuple[nn.Module, str, Any]]

    def undo(self) -> None:
        for module, name, value in self.previous:
            if value is None:  # there was only that of the class
                module._modules.pop(name, None)
                vars(module).pop(name, None)
            else:
                setattr(module, name, value)


def replace_values(previous: list[tuple[nn.Module, str, Any]], values: Iterable[Any]) -> Replacement:
    """Set an attribute of each module to a value; `previous` has the modules, the names and the old values."""
    for (module, name, _), value in zip(previous, values, strict=True):
        setattr(module, name, value)
    replacement = Replacement(len(previous))
    replacement.previous = previous
    return replacement


def replace_layers(model: nn.Module, old: type[Old], make: Callable[[Old], nn.Module], where: str = "*") -> Replacement:
    """Replace every layer of class `old` in `model` by `make(layer)`; return in how many places, to undo it.

    It works on loaded weights: `make` takes what it needs from the layer. What is new in its result gets the layer's
    mode, and the device and dtype of its weights. A layer that is shared by several places stays shared. `where`: a
    pattern of names as in `named_modules`, such as "up_blocks.1.*". Raises `InputError` for a pattern that matches no
    module and for other types, and then replaces nothing.
    """
    if not isinstance(model, nn.Module):
        raise invalid(InputTypeError, "model", "a module", short_repr(model))
    if not isinstance(old, type):
        raise invalid(InputTypeError, "old", "a class of layers", short_repr(old))
    if not callable(make):
        raise invalid(InputTypeError, "make", "a function from a layer to its replacement", short_repr(make))
    check_type("where", where, str)
    paths = list(model.named_modules(remove_duplicate=False))
    if not any(fnmatchcase(path, where) for path, _ in paths):
        expected = "a pattern that matches a name of named_modules(), such as 'up_blocks.1.*'"
        raise invalid(InputError, "where", expected, short_repr(where))
    found = {
        (parent, name): child
        for path, parent in paths
        for name, child in parent._modules.items()
        if isinstance(child, old) and fnmatchcase(f"{path}.{name}".removeprefix("."), where)
    }
    places: list[tuple[nn.Module, str, Any]] = [(*place, child) for place, child in found.items()]
    default, made = first_weight(model), {}
    for layer in dict.fromkeys(child for _, _, child in places):
        made[layer] = new = make(layer)  # type: ignore[arg-type]
        if not isinstance(new, nn.Module):
            got = f"{short_repr(new)} for a {type(layer).__name__}"
            raise invalid(InputTypeError, "make", "a function that returns a module", got)
        adapt_new(new, layer, default)
    return replace_values(places, [made[child] for _, _, child in places])


def adapt_new(new: nn.Module, old: nn.Module, default: Tensor | None = None) -> None:
    """Set what `new` does not share with `old` to the mode of `old`, and to the device and dtype of its weights.

    `default` is the weight to follow where `old` has none.
    """
    modes, weight = {module: module.training for module in old.modules()}, first_weight(old)
    shared = {id(tensor) for tensor in (*old.parameters(), *old.buffers())}
    weight = default if weight is None else weight

    def adapt(tensor: Tensor) -> Tensor:
        if weight is None or weight.is_meta or tensor.is_meta or id(tensor) in shared:
            return tensor
        return tensor.to(weight.device, weight.dtype if tensor.dtype in FLOAT_DTYPES else tensor.dtype)

    if new not in modes:
        new.train(old.training)
    for module in new.modules():
        if module in modes:
            module.training = modes[module]
        elif any(adapt(tensor) is not tensor for tensor in (*module.parameters(False), *module.buffers(False))):
            module._apply(adapt, recurse=False)


def first_weight(model: nn.Module) -> Tensor | None:
    """Return the first parameter of a dtype that models compute in."""
    return next((p for p in model.parameters() if p.dtype in FLOAT_DTYPES), None)
