"""What layers are told beside the latents, a time and a context, and what they make of these alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

IMVAR = __name__.partition(".")[0]
GLOBAL_HOOKS = (
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_forward_hooks,
)  # hooks of all layers


class Precomputed(NamedTuple):
    """What one layer, or a list of them, made of a time or a context: the part of its answer that no latents change.

    `weights`: in a run, some of the layer's own, put together so that they multiply at once.
    """

    value: Any
    weights: tuple[Tensor, ...] = ()


def precompute(layer: nn.Module, told: Tensor) -> Any:
    """`told` as `layer.prepare` makes it ready; as it came, for a layer that is not ours or that others watch."""
    return layer.prepare(told) if hasattr(layer, "prepare") and is_stock(layer) else told  # type: ignore[operator]


def is_stock(layer: nn.Module) -> bool:
    """Whether this layer is PyTorch's or imvar's as it was written, without a hook or an override of others.

    Nor with a weight that is made anew for every call, as `torch.nn.utils` has it.
    """
    hooks = *layer._forward_pre_hooks.values(), *layer._forward_hooks.values()
    return (
        "forward" not in vars(layer)
        and all(map(is_first_party, (type(layer), type(layer).forward)))
        and all(top_package(hook) == IMVAR for hook in hooks)
        and "parametrizations" not in layer._modules
    )


def is_unmodified(model: nn.Module) -> bool:
    """Whether a run of this model may be prepared: every layer is as it was written, every attention kernel a softmax.

    Else somebody sees what goes from layer to layer, and gets to see what a plain call shows.
    """
    return not any(GLOBAL_HOOKS) and all(
        is_stock(layer) and getattr(layer, "is_softmax", True) for layer in model.modules()
    )


def is_first_party(code: Any) -> bool:
    return top_package(code) in ("torch", IMVAR)


def top_package(code: Any) -> str:
    return (getattr(code, "__module__", None) or "").partition(".")[0]


def write_count(tensor: Tensor) -> int:
    """How often a tensor was written to, where autograd sees that."""
    return 0 if tensor.is_inference() else tensor._version


def repeat_to_batch(x: Tensor, like: Tensor) -> Tensor:
    """x, b ..., over and over until it is as many as `like`, k b ...: a context of k per sample makes k of each.

    What comes before the first context is thus computed once for both halves of guidance.
    """
    return x if len(x) == len(like) else torch.cat([x] * (len(like) // len(x)))
