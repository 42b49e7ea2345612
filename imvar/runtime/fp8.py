"""FP8 inference (arXiv:2209.05433): linear layers that multiply in E4M3, twice as fast on newer GPUs. Approximate."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import InputError, invalid
from ..models.attention import SelfAttention
from ..models.layers import FeedForward, replace_layers
from ..models.ops import Linear, write_count
from ..models.stock import is_stock

E4M3 = torch.float8_e4m3fn  # four bits of exponent, three of mantissa
MAX_E4M3 = torch.finfo(E4M3).max
CHANNEL_MULTIPLE = 16  # which the scaled product requires
MIN_COMPUTE_CAPABILITY = (8, 9)  # Ada; then Hopper and later


class Fp8Linear(Linear):
    """A linear layer whose input and weight are quantized to E4M3 row by row, each row with its own scale.

    The weight is quantized when the layer is created, moved or loaded, and again after it was changed in place where
    autograd counts it. With gradients enabled the layer computes in full precision.
    """

    in_place_of = Linear  # with the same weights
    weight_fp8: Tensor
    scale: Tensor
    quantized_version: Any = None

    @classmethod
    def from_layer(cls, layer: Linear) -> Self | Linear:
        """Return the layer in FP8 with the same parameters; itself if it is not a stock layer of a supported size."""
        fits = not layer.in_features % CHANNEL_MULTIPLE and not layer.out_features % CHANNEL_MULTIPLE
        if type(layer) is not Linear or not is_stock(layer) or not fits:
            return layer
        fp8 = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        fp8.weight, fp8.bias = layer.weight, layer.bias
        fp8.quantize_weight()
        return fp8.train(layer.training)

    def to_linear(self) -> Linear:
        """Return a full-precision layer with the current parameters."""
        layer = Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer.train(self.training)

    @torch.inference_mode(False)
    @torch.no_grad()
    def quantize_weight(self) -> None:
        """Quantize the weight, if it has changed since the last time."""
        if self.quantized_version != weight_version(self.weight):
            self.weight_fp8, self.scale = quantize_rows(self.weight)
            self.quantized_version = weight_version(self.weight)

    def _apply(self, *args: Any, **options: Any) -> Self:
        super()._apply(*args, **options)
        self.quantized_version = None
        self.quantize_weight()
        return self

    def __getstate__(self) -> dict[str, Any]:
        derived = ("weight_fp8", "scale", "quantized_version")  # recomputed after unpickling
        return {name: value for name, value in super().__getstate__().items() if name not in derived}

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(input)
        if not torch.compiler.is_compiling():
            self.quantize_weight()
        x, scale = quantize_rows(input.flatten(0, -2))
        out = torch.ops.aten._scaled_mm(x, self.weight_fp8.T, scale, self.scale.T, out_dtype=torch.bfloat16)
        out = out.to(input.dtype).unflatten(0, input.shape[:-1])
        return out if self.bias is None else out + self.bias


def weight_version(weight: Tensor) -> tuple[int, int]:
    """Return a value that changes with the weight."""
    return weight.data_ptr(), write_count(weight)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (n, c) as E4M3, and the scale of each (n, 1), float32, by which to multiply them back."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / MAX_E4M3
    return (x / scale).clamp(-MAX_E4M3, MAX_E4M3).to(E4M3), scale


def enable(model: nn.Module) -> None:
    """Replace the linear layers of self-attention and feed-forward layers by `Fp8Linear`."""
    device = next(model.parameters()).device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_COMPUTE_CAPABILITY:
        expected = f"a GPU of compute capability {'.'.join(map(str, MIN_COMPUTE_CAPABILITY))} or higher"
        raise invalid(InputError, "enable_fp8", expected, torch.cuda.get_device_name(device))
    for module in model.modules():
        if isinstance(module, (SelfAttention, FeedForward)):
            replace_layers(module, Linear, Fp8Linear.from_layer)


def disable(model: nn.Module) -> None:
    """Replace every `Fp8Linear` by a full-precision layer."""
    replace_layers(model, Fp8Linear, Fp8Linear.to_linear)
