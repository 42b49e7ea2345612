"""Int8 inference on a CPU (arXiv:1712.05877): linear layers and convolutions of 8-bit integers. Approximate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import InputError, invalid
from ..kernels.cpu_kernels import DTYPES, is_plain_inference
from ..kernels.int8_kernels import (
    Geometry,
    Int8Weight,
    has_int8_kernels,
    int8_conv2d,
    int8_linear,
    pack_conv,
    pack_linear,
)
from ..kernels.polyphase import is_zero_padded
from ..models.attention import SelfAttention
from ..models.layers import Downsample, FeedForward, ResnetBlock, replace_layers
from ..models.ops import CONV2D, LINEAR, Conv2d, Linear
from .quantized import QuantizedLayer, first_parameter, restore_layers, warn_of_none

KERNEL_SIZE = (3, 3)  # 1x1 shortcuts take little time in full precision


class Int8Layer(QuantizedLayer):
    """A layer in int8, which computes in full precision where its kernels do not apply.

    These are gradients, autocast, compiled and traced code, other devices and other dtypes.
    """

    compilable = False

    def applies_to(self, x: Tensor) -> bool:
        """Return whether int8 kernels compute this input, and quantize the weight if it has changed."""
        if not is_plain_inference(x) or self.weight.dtype != x.dtype or not self.weight.is_cpu:
            return False
        replaced = nn.Linear.forward is not LINEAR or nn.Conv2d.forward is not CONV2D
        if replaced or not torch.backends.mkldnn.enabled:  # type: ignore[attr-defined]
            return False
        self.quantize_weight()
        return True

    def quantize(self) -> Int8Weight | None:
        return self.pack() if self.weight.is_cpu and self.weight.dtype in DTYPES else None

    def pack(self) -> Int8Weight:
        raise NotImplementedError


class Int8Linear(Int8Layer, Linear):
    """A linear layer of 8-bit integers."""

    in_place_of = Linear

    def pack(self) -> Int8Weight:
        return pack_linear(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return int8_linear(input, self.quantized, self.bias) if self.applies_to(input) else super().forward(input)


class Int8Conv2d(Int8Layer, Conv2d):
    """A convolution of 8-bit integers."""

    in_place_of = Conv2d

    @classmethod
    def fits(cls, layer: Conv2d) -> bool:
        return is_zero_padded(layer) and layer.kernel_size == KERNEL_SIZE

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]  # `fits`

    def pack(self) -> Int8Weight:
        return pack_conv(self.weight, self.geometry)

    def forward(self, input: Tensor) -> Tensor:
        if not self.applies_to(input):
            return super().forward(input)
        return int8_conv2d(input, self.quantized, self.bias, self.geometry)


def enable(model: nn.Module) -> None:
    """Replace the large layers of the UNet: the linear ones of self-attention and feed-forward layers, convolutions."""
    weight = first_parameter(model, "enable_int8")
    if not weight.is_cpu:
        raise invalid(InputError, "enable_int8", "a UNet on a CPU", f"one on {weight.device}")
    if weight.dtype not in DTYPES:
        raise invalid(InputError, "enable_int8", "a UNet in float32 or bfloat16", str(weight.dtype))
    if not has_int8_kernels():
        expected = "a processor with VNNI or AMX instructions, and PyTorch with oneDNN"
        raise invalid(InputError, "enable_int8", expected, f"a processor or PyTorch {torch.__version__} without")
    restore_layers(model)
    for module in model.modules():
        if isinstance(module, (SelfAttention, FeedForward)):
            replace_layers(module, Linear, Int8Linear.from_layer)
        elif isinstance(module, (ResnetBlock, Downsample)):
            replace_layers(module, Conv2d, Int8Conv2d.from_layer)
    warn_of_none(model, "enable_int8")


def disable(model: nn.Module) -> None:
    """Replace every layer in int8 by a full-precision one."""
    restore_layers(model, Int8Layer)
