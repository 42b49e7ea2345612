"""Which layers are stock: of PyTorch's or imvar's classes, without hooks, patched methods or parametrizations.

Fast paths that skip or share work apply to stock layers alone, so that every third-party hook, layer and kernel gets
the tensors of a plain forward pass. A custom layer or kernel that computes each row of the batch on its own, from its
inputs and weights alone, may have an attribute `precomputable = True`: then the fast paths run around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from inspect import isroutine
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..weights.origin import layers_of

IMVAR = __name__.partition(".")[0]
OWN = "torch", IMVAR
GLOBAL_HOOKS = nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks


def is_stock(layer: nn.Module) -> bool:
    """Return whether a layer's class and forward are PyTorch's or imvar's, and nothing on it changes its output."""
    return is_stock_class(type(layer)) and change_of(layer) is None


def is_stock_class(kind: type[nn.Module]) -> bool:
    """Return whether a class and its forward are PyTorch's or imvar's; not if it quantizes a batch as a whole."""
    own = top_package(kind) in OWN and top_package(kind.forward) in OWN
    return own and not kind.__module__.startswith("torch.ao.")


def are_stock(*layers: nn.Module) -> bool:
    """Return whether all these layers are stock, and no hook is registered for every module of the process."""
    return not any(GLOBAL_HOOKS) and all(map(is_stock, layers))


def change_of(layer: nn.Module) -> str | None:
    """Return what changes a layer's output, or uses it, without being part of the layer's class; None for nothing."""
    backward = *layer._backward_pre_hooks.values(), *layer._backward_hooks.values()
    hooks = *layer._forward_pre_hooks.values(), *layer._forward_hooks.values(), *backward
    if any(top_package(hook) != IMVAR for hook in hooks):
        return "a hook"
    if "parametrizations" in layer._modules:  # computes a weight in every call
        return "a parametrized weight"
    if isinstance(layer, (_DropoutNd, _BatchNorm)) and layer.training and getattr(layer, "p", 1):
        return f"{type(layer).__name__} in training mode"
    methods = method_names(type(layer))
    for name in [name for name in vars(layer) if name in methods]:
        value, method = vars(layer)[name], getattr(type(layer), name)
        same = getattr(value, "__func__", value) in (method, getattr(method, "__wrapped__", method))
        if not same or getattr(value, "__self__", None) is not layer:  # accelerate leaves the same when it unwraps
            return f"its own {name}"
    return None


def method_names(kind: type) -> frozenset[str]:
    """Return the names of the methods that a class has, except those of slots for functions."""
    if kind not in _method_names:
        methods = {name for name in dir(kind) if isroutine(getattr(kind, name, None))}
        _method_names[kind] = frozenset(methods.difference(getattr(kind, "slots_", ())))
    return _method_names[kind]


_method_names: dict[type, frozenset[str]] = {}  # rather than a functools.cache, which torch.compile warns about


def is_unmodified(model: nn.Module) -> bool:
    """Return whether fast paths may run a model: all its layers and kernels are stock, or declared `precomputable`."""
    return next(reasons_for_plain(model), None) is None


def reasons_for_plain(model: nn.Module) -> Iterator[str]:
    """Yield what keeps a model from fast paths: the names of layers, each with the reason."""
    if any(GLOBAL_HOOKS):
        yield "a hook on every module of the process"
    layers = layers_of(model)
    kinds = {kind: reason_of_class(kind) for kind in set(map(type, layers))}
    with_kernel = {kind for kind in kinds if hasattr(kind, "custom_kernel")}
    names: dict[nn.Module, str] = {}
    for layer in layers:
        kernel_reason = reason_of_kernel(layer) if type(layer) in with_kernel else None
        if reason := kinds[type(layer)] or kernel_reason or change_of(layer):
            names = names or {layer: name for name, layer in model.named_modules()}
            yield f"{names[layer] or 'the model'}: {reason}"


def reason_of_class(kind: type[nn.Module]) -> str | None:
    """Return what keeps a model with a layer of this class from fast paths; None if nothing does."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, method in vars(base).items() if top_package(base) in OWN else ():
            if isinstance(method, FunctionType) and top_package(method) not in OWN:
                return f"{base.__name__}.{name} was replaced"
    known = is_stock_class(kind) or getattr(kind, "precomputable", False)
    return None if known else f"{kind.__name__} is a custom class"


def reason_of_kernel(layer: nn.Module) -> str | None:
    """Return what keeps a model with this attention layer's kernel from fast paths; None if nothing does."""
    kernel = getattr(layer, "custom_kernel", None)
    of_class = getattr(kernel, "__func__", kernel) is getattr(type(layer), "attend", None)
    if kernel is None or of_class or getattr(kernel, "precomputable", False):
        return None
    return f"{getattr(kernel, '__name__', type(kernel).__name__)} is a custom kernel"


def top_package(code: Callable[..., Any]) -> str:
    """Return the top-level package that defines a class or function, also of one that functools.wraps disguises."""
    code = code.func if isinstance(code, partial) else code
    module = getattr(code, "__module__", None)
    if hasattr(code, "__wrapped__") and isinstance(code, FunctionType):
        module = code.__globals__.get("__name__")
    return (module or "").partition(".")[0]
