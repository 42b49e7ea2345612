"""FP8 inference (arXiv:2209.05433): linear layers that multiply in E4M3, twice as fast on newer GPUs. Approximate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError, invalid
from ..models.attention import SelfAttention
from ..models.layers import FeedForward, replace_layers
from ..models.ops import Linear
from .quantized import QuantizedLayer, first_parameter, restore_layers, warn_of_none

E4M3 = torch.float8_e4m3fn  # four bits of exponent, three of mantissa
MAX_E4M3 = torch.finfo(E4M3).max
CHANNEL_MULTIPLE = 16  # which the scaled product requires
MIN_COMPUTE_CAPABILITY = (8, 9)  # Ada; then Hopper and later


class Fp8Rows(NamedTuple):
    """Rows (n, c) in E4M3, and the scale of each (n, 1), float32, by which to multiply them back."""

    values: Tensor
    scale: Tensor


class Fp8Linear(QuantizedLayer, Linear):
    """A linear layer whose input and weight are quantized to E4M3 row by row, each row with its own scale.

    With gradients enabled the layer computes in full precision.
    """

    in_place_of = Linear

    @classmethod
    def fits(cls, layer: Linear) -> bool:
        return not layer.in_features % CHANNEL_MULTIPLE and not layer.out_features % CHANNEL_MULTIPLE

    def quantize(self) -> Fp8Rows:
        return quantize_rows(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(input)
        if not torch.compiler.is_compiling():
            self.quantize_weight()
        x, scale = quantize_rows(input.flatten(0, -2))
        weight, weight_scale = self.quantized
        out = torch.ops.aten._scaled_mm(x, weight.T, scale, weight_scale.T, out_dtype=torch.bfloat16)
        out = out.to(input.dtype).unflatten(0, input.shape[:-1])
        return out if self.bias is None else out + self.bias


def quantize_rows(x: Tensor) -> Fp8Rows:
    """Quantize rows (n, c)."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / MAX_E4M3
    return Fp8Rows((x / scale).clamp(-MAX_E4M3, MAX_E4M3).to(E4M3), scale)


def enable(model: nn.Module) -> None:
    """Replace the linear layers of self-attention and feed-forward layers by `Fp8Linear`."""
    device = first_parameter(model, "enable_fp8").device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_COMPUTE_CAPABILITY:
        expected = f"a GPU of compute capability {'.'.join(map(str, MIN_COMPUTE_CAPABILITY))} or higher"
        raise invalid(InputError, "enable_fp8", expected, torch.cuda.get_device_name(device))
    restore_layers(model)
    for module in model.modules():
        if isinstance(module, (SelfAttention, FeedForward)):
            replace_layers(module, Linear, Fp8Linear.from_layer)
    warn_of_none(model, "enable_fp8")


def disable(model: nn.Module) -> None:
    """Replace every `Fp8Linear` by a full-precision layer."""
    restore_layers(model, Fp8Linear)
