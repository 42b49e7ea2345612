"""Which layers are stock: PyTorch's or imvar's own, without hooks, overrides or parametrizations.

Fast paths that skip or share work apply to stock layers alone, so that every third-party hook, layer and kernel gets
the tensors of a plain forward pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

IMVAR = __name__.partition(".")[0]
GLOBAL_HOOKS = nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks


def is_stock(layer: nn.Module) -> bool:
    """Return whether a layer's class and forward are PyTorch's or imvar's, and no third-party hook is on it.

    A layer whose weight is recomputed in every call (`torch.nn.utils.parametrizations`, pruning) is not stock.
    """
    backward = *layer._backward_pre_hooks.values(), *layer._backward_hooks.values()
    hooks = *layer._forward_pre_hooks.values(), *layer._forward_hooks.values(), *backward
    return (
        "forward" not in vars(layer)
        and all(top_package(code) in ("torch", IMVAR) for code in (type(layer), type(layer).forward))
        and all(top_package(hook) == IMVAR for hook in hooks)
        and "parametrizations" not in layer._modules
    )


def are_stock(*layers: nn.Module) -> bool:
    """Return whether all these layers are stock, and no hook is registered for every module of the process."""
    return not any(GLOBAL_HOOKS) and all(map(is_stock, layers))


def is_unmodified(model: nn.Module) -> bool:
    """Return whether all layers of a model are stock and all its attention kernels are a softmax."""
    return are_stock(*model.modules()) and all(getattr(layer, "is_softmax", True) for layer in model.modules())


def top_package(code: Any) -> str:
    code = code.func if isinstance(code, partial) else code
    return (getattr(code, "__module__", None) or "").partition(".")[0]
