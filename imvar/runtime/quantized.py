"""Layers with a quantized copy of their weight beside it: the base of FP8 and int8."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..errors import InputError, describe, invalid, warn_user
from ..models.layers import replace_layers
from ..models.ops import write_count
from ..models.stock import is_stock


class QuantizedLayer(nn.Module):
    """A layer that computes with a quantized copy of its weight, in place of one of another class.

    The weight is quantized when the layer is created, moved or loaded, and again after it was changed in place where
    autograd counts it.
    """

    in_place_of: ClassVar[type[nn.Module]]  # with the same weights
    compilable: ClassVar[bool] = True
    weight: Tensor
    quantized: Any = None
    _quantized_version: Any = None

    @classmethod
    def fits(cls, layer: Any) -> bool:
        """Return whether the class can compute what a layer of class `in_place_of` does."""
        return True

    @classmethod
    def from_layer(cls, layer: nn.Module) -> Self | nn.Module:
        """Return the layer in this class, with the same parameters; itself if it is not a stock layer that fits."""
        if type(layer) is not cls.in_place_of or not is_stock(layer) or not cls.fits(layer):
            return layer
        new = in_class(cls, layer)
        new.quantize_weight()
        return new

    def to_layer(self) -> nn.Module:
        """Return a full-precision layer with the current parameters."""
        return in_class(self.in_place_of, self)

    def quantize(self) -> Any:
        """Return the quantized weight."""
        raise NotImplementedError

    @torch.inference_mode(False)
    @torch.no_grad()
    def quantize_weight(self) -> None:
        """Quantize the weight, if it has changed since the last time."""
        weight, last = self.weight, self._quantized_version
        if last is None or last[0]() is not weight or last[1] != weight_version(weight):
            self.quantized = self.quantize()
            self._quantized_version = weakref.ref(weight), weight_version(weight)

    def _apply(self, *args: Any, **options: Any) -> Self:
        super()._apply(*args, **options)
        self._quantized_version = None
        self.quantize_weight()
        return self

    def __getstate__(self) -> dict[str, Any]:
        derived = ("quantized", "_quantized_version")  # recomputed after unpickling
        return {name: value for name, value in super().__getstate__().items() if name not in derived}


def in_class(kind: type[Any], layer: nn.Module) -> Any:
    """Return a layer of another class in the state of `layer`, with its parameters."""
    new = object.__new__(kind)
    vars(new).update(layer.__getstate__())  # type: ignore[attr-defined]  # of object
    return new


def weight_version(weight: Tensor) -> tuple[int, int]:
    """Return a value that changes with the weight, but that another weight, in the same memory later, may have."""
    return weight.data_ptr(), write_count(weight)


def quantized_layers(model: nn.Module) -> list[QuantizedLayer]:
    return [layer for layer in model.modules() if isinstance(layer, QuantizedLayer)]


def first_parameter(model: Any, name: str) -> Tensor:
    """Return the first parameter of the UNet. Raises `InputError`, about `name`, if there is none."""
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if weight is None:
        raise invalid(InputError, name, "a UNet that is a torch module with parameters", describe(model))
    return weight


def warn_of_none(model: nn.Module, name: str) -> None:
    """Warn, about `name`, that no layer was replaced."""
    if not quantized_layers(model):
        warn_user(f"{name}: no layer is quantized; the kernels are for imvar's own layers, without hooks")


def restore_layers(model: nn.Module, kind: type[QuantizedLayer] = QuantizedLayer) -> None:
    """Replace every quantized layer of class `kind` by a full-precision one."""
    replace_layers(model, kind, kind.to_layer)
