"""Approximate: linear layers that multiply in eight bits (arXiv:2209.05433), which newer GPUs do at twice the speed."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.attention import SelfAttention
from ..models.layers import FeedForward, Linear, replace_layers
from ..models.stock import is_stock, write_count

E4M3 = torch.float8_e4m3fn  # four bits of exponent, three of mantissa
MAX_E4M3 = torch.finfo(E4M3).max
CHANNEL_MULTIPLE = 16  # of channels, which the product asks for
MIN_COMPUTE_CAPABILITY = (8, 9)  # Ada; then Hopper and later


class Fp8Linear(Linear):
    """A linear layer whose input and weight are rounded to E4M3 row by row, each scaled to what the format holds.

    The weight is rounded when the layer is made, moved or loaded, and again when it was changed in place where
    autograd sees it. Gradients go the exact way.
    """

    weight8: Tensor
    scale: Tensor
    rounded_of: Any = None

    @classmethod
    def from_layer(cls, layer: Linear) -> Self | Linear:
        """The layer with the same parameters; itself where it is of another class, of a size that the product does
        not take, or watched by others."""
        fits = not layer.in_features % CHANNEL_MULTIPLE and not layer.out_features % CHANNEL_MULTIPLE
        if type(layer) is not Linear or not is_stock(layer) or not fits:
            return layer
        made = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        made.round_weight()
        return made.train(layer.training)

    def exact(self) -> Linear:
        """The layer that this was made of, with its parameters as they are now."""
        layer = Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer.train(self.training)

    @torch.inference_mode(False)
    @torch.no_grad()
    def round_weight(self) -> None:
        """Anew, if the weight was changed since."""
        if self.rounded_of != weight_version(self.weight):
            self.weight8, self.scale = quantize_rows(self.weight)
            self.rounded_of = weight_version(self.weight)

    def _apply(self, *args: Any, **options: Any) -> Self:
        super()._apply(*args, **options)
        self.rounded_of = None
        self.round_weight()
        return self

    def __getstate__(self) -> dict[str, Any]:
        made = ("weight8", "scale", "rounded_of")  # anew by whoever reads it
        return {name: value for name, value in super().__getstate__().items() if name not in made}

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(input)
        if not torch.compiler.is_compiling():
            self.round_weight()
        x, scale = quantize_rows(input.flatten(0, -2))
        made = torch.ops.aten._scaled_mm(x, self.weight8.T, scale, self.scale.T, out_dtype=torch.bfloat16)
        made = made.to(input.dtype).unflatten(0, input.shape[:-1])
        return made if self.bias is None else made + self.bias


def weight_version(weight: Tensor) -> tuple[int, int]:
    """Changes with the weight."""
    return weight.data_ptr(), write_count(weight)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, c) as E4M3, and the scale of each, (n, 1) float32, that they are to be multiplied by again."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / MAX_E4M3
    return (x / scale).clamp(-MAX_E4M3, MAX_E4M3).to(E4M3), scale


def enable(model: nn.Module) -> None:
    """Have self-attention and feed-forward layers multiply in eight bits."""
    device = next(model.parameters()).device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_COMPUTE_CAPABILITY:
        raise InputError(
            f"enable_fp8: {torch.cuda.get_device_name(device)} does not multiply in eight bits; one of "
            f"compute capability {'.'.join(map(str, MIN_COMPUTE_CAPABILITY))} or more would do"
        )
    for part in model.modules():
        if isinstance(part, (SelfAttention, FeedForward)):
            replace_layers(part, Linear, Fp8Linear.from_layer)


def disable(model: nn.Module) -> None:
    replace_layers(model, Fp8Linear, Fp8Linear.exact)
