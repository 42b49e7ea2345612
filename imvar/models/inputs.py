"""What the models can be called with: the one place that checks it, so that the models themselves need not."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..checks import single, tensor
from ..errors import InputError, InputTypeError, shown
from .told import Ready


def unet(model: Any, sample: Any, timestep: Any, encoder_hidden_states: Any, *_: Any, **__: Any) -> None:
    """Latents, a time, and a context, of sizes that go together."""
    context, weight = encoder_hidden_states, weight_of(model.conv_in)
    tensor("sample", sample, "b", getattr(model.conv_in, "in_channels", "c"), "h", "w", like=weight)
    if not isinstance(context, Ready):
        tensor("encoder_hidden_states", context, "b", "m", context_width(model), like=weight)
        if not len(sample) or len(context) % len(sample):
            raise InputError(f"encoder_hidden_states: {len(context)} came for {len(sample)} samples; one, or as many "
                             "again, for each would do", key="encoder_hidden_states")
    if not isinstance(timestep, Ready):
        time(timestep, len(sample))


def weight_of(layer: Any) -> Tensor | None:
    """The weight of a layer, which a fork may have put another in the place of."""
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.is_floating_point() else None


def context_width(model: Any) -> int | str:
    """How wide a token of context is, by the layer that takes it; any number, where a fork has another layer there."""
    try:
        return model.mid.transformers[0].blocks[0].cross_attn.to_k.in_features
    except (AttributeError, IndexError):
        return "c"


def time(timestep: Any, samples: int) -> None:
    """A number, or one for each sample."""
    if isinstance(timestep, Tensor) and timestep.numel() != 1:
        if timestep.shape != (samples,):
            raise InputError(f"timestep: shape {tuple(timestep.shape)} came for {samples} samples; (), or ({samples},) "
                             "would do", key="timestep")
        return
    if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
        return  # its value is not worth waiting for
    number = single(timestep)
    if isinstance(number, (bool, str)) or not hasattr(number, "__float__"):
        raise InputTypeError(f"timestep={shown(timestep)}: a number, or a tensor of one for each sample, would do",
                             key="timestep")
    if not 0 <= float(number) < math.inf:
        raise InputError(f"timestep={shown(timestep)}: a finite number from 0 would do", key="timestep")


def pictures(model: Any, x: Any, *_: Any, **__: Any) -> None:
    """What the autoencoder encodes."""
    first = model.encoder.conv_in
    tensor("x", x, "b", getattr(first, "in_channels", "c"), "h", "w", like=weight_of(first))
    least = 2 ** (len(model.config.block_out_channels) - 1)
    if min(x.shape[2:]) < least:
        raise InputError(f"x: pictures of {tuple(x.shape[2:])} came; from {least} pixels a side would do", key="x")


def latents(model: Any, z: Any, *_: Any, **__: Any) -> None:
    """What the autoencoder decodes."""
    first = model.post_quant_conv
    tensor("z", z, "b", getattr(first, "in_channels", "c"), "h", "w", like=weight_of(first))


def clip(model: Any, pixel_values: Any, *_: Any, **__: Any) -> None:
    """What the image encoder looks at; of any dtype of floats, as in the reference."""
    tensor("pixel_values", pixel_values, "b", model.config.num_channels, "h", "w")


def checker(model: Any, clip_input: Any, images: Any, *_: Any, **__: Any) -> None:
    """What the safety checker looks at, and as many pictures."""
    tensor("clip_input", clip_input, "b", model.config.vision_config.num_channels, "h", "w")
    if not hasattr(images, "__len__") or len(images) != len(clip_input):
        came = len(images) if hasattr(images, "__len__") else type(images).__name__
        raise InputError(f"images: {came} came for {len(clip_input)} of clip_input; one each would do", key="images")
