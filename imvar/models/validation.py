"""Validation of what the models are called with; the forward passes themselves check nothing."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Conv2d

from ..checks import as_number, check_float, check_has_data, check_int, check_tensor
from ..errors import InputError, InputTypeError, describe, invalid, short_repr
from .conditioning import Precomputed
from .stock import IMVAR, is_stock, top_package

RESIDUALS = "down_block_additional_residuals", "mid_block_additional_residual"
MAX_TIMESTEP = 2**31  # far beyond what any model was trained for


def check_unet_inputs(
    model: Any,
    sample: Any,
    timestep: Any,
    encoder_hidden_states: Any,
    *_: Any,
    down_block_additional_residuals: Any = None,
    mid_block_additional_residual: Any = None,
    merge: Any = None,
    **__: Any,
) -> None:
    """Check that latents, timestep and context have shapes, dtypes and devices that go together."""
    context, (channels, weight) = encoder_hidden_states, conv_spec(model.conv_in)
    check_tensor("sample", sample, "b", channels, "h", "w", like=weight)
    if not isinstance(context, Precomputed):
        check_tensor("encoder_hidden_states", context, "b", "m", context_width(model), like=weight)
        if len(context) % len(sample):
            expected = f"a multiple of the {len(sample)} samples"
            raise invalid(InputError, "encoder_hidden_states", expected, f"{len(context)}")
    if not isinstance(timestep, Precomputed):
        if isinstance(timestep, Tensor) and not sample.is_meta:
            check_has_data("timestep", timestep)
        check_timestep(timestep, len(sample))
    residuals = down_block_additional_residuals, mid_block_additional_residual
    for name, residual, other in zip(RESIDUALS, residuals, reversed(residuals), strict=True):
        if residual is None and other is not None:
            raise invalid(InputError, name, "both arguments of a ControlNet's residuals, or neither", "None")
    if not isinstance(residuals[0], (tuple, list, NoneType)):
        raise invalid(InputTypeError, RESIDUALS[0], "a list of tensors", describe(residuals[0]))
    if merge is not None and not callable(merge):
        raise invalid(InputTypeError, "merge", "a function of h, skip and the up block's index", short_repr(merge))


def check_residuals(residuals: Sequence[Any], features: Sequence[Tensor], samples: int) -> None:
    """Check the residuals of a ControlNet: one per skip connection, and one for the output of the mid block."""
    if len(residuals) != len(features):
        expected = f"{len(features) - 1} residuals, one per skip connection"
        raise invalid(InputError, RESIDUALS[0], expected, f"{len(residuals) - 1}")
    names = [*(f"{RESIDUALS[0]}[{i}]" for i in range(len(residuals) - 1)), RESIDUALS[1]]
    for name, residual, x in zip(names, residuals, features, strict=True):
        check_tensor(name, residual, "b", x.shape[1], "h", "w", like=x)
        batches = 1, samples, len(features[-1])
        if residual.shape[2:] not in (x.shape[2:], (1, 1)) or len(residual) not in batches:
            expected = f"a tensor of shape {(batches[-1], *x.shape[1:])}, or one of {samples} samples"
            raise invalid(InputError, name, expected, describe(residual))


def conv_spec(layer: Any) -> tuple[int | str, Tensor | None]:
    """Return a convolution's input channels and weight; unknown ("c", None) for custom layers and hooked ones."""
    if not isinstance(layer, Conv2d) or not is_stock(layer) or not layer.weight.is_floating_point():
        return "c", None
    return layer.in_channels, layer.weight


def context_width(model: Any) -> int | str:
    """Return the width of a context token, by the layer that projects it; unknown ("c") for a custom layer."""
    try:
        layer = model.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
        return layer.in_features if is_stock(layer) else "c"
    except (AttributeError, IndexError):
        return "c"


def check_timestep(timestep: Any, samples: int) -> None:
    """Check that a timestep is a finite number from 0, or a tensor of one or one per sample."""
    if isinstance(timestep, Tensor):
        if timestep.numel() != 1 and timestep.shape != (samples,):
            expected = f"a tensor () or ({samples},), one per sample"
            raise invalid(InputError, "timestep", expected, describe(timestep))
        if timestep.is_complex():
            raise invalid(InputTypeError, "timestep", "real numbers", str(timestep.dtype))
        if timestep.device.type != "cpu":
            return  # reading its value would wait for the device
        try:
            values = timestep.detach().flatten().tolist()
        except RuntimeError:  # it has none while it is traced
            return
    else:
        values = [timestep]
    for value in values:
        if isinstance(value, (torch.SymInt, torch.SymFloat)):  # it has none while it is traced
            continue
        number = as_number(value)
        if number is None:
            expected = "a number, or a tensor of one per sample"
            raise invalid(InputTypeError, "timestep", expected, short_repr(value))
        if not 0 <= number <= MAX_TIMESTEP:
            raise invalid(InputError, "timestep", "a finite number from 0", short_repr(value))


def check_attention_output(kernel: Any, output: Any, q: Tensor) -> Tensor:
    """Return what an attention kernel returned for the queries q, if it has their shape."""
    if not isinstance(output, Tensor) or output.shape != q.shape:
        expected = f"a kernel that returns a tensor of q's shape {tuple(q.shape)}"
        raise invalid(InputTypeError, "attend", expected, f"{describe(output)} from {short_repr(kernel)}")
    return output


def check_encode_inputs(model: Any, x: Any, *_: Any, **__: Any) -> None:
    """Check the images that the autoencoder encodes."""
    run_onload_hook(model)
    channels, weight = conv_spec(model.encoder.conv_in)
    check_tensor("x", x, "b", channels, "h", "w", like=weight)
    min_side = 2 ** (len(model.config.block_out_channels) - 1)
    if min(x.shape[2:]) < min_side:
        raise invalid(InputError, "x", f"images of at least {min_side} pixels a side", f"{tuple(x.shape[2:])}")
    if model.use_tiling:
        check_tiling(model, max(x.shape[2:]), "tile_sample_min_size", "tile_latent_min_size")


def check_decode_inputs(model: Any, z: Any, *_: Any, **__: Any) -> None:
    """Check the latents that the autoencoder decodes."""
    run_onload_hook(model)
    channels, weight = conv_spec(model.post_quant_conv)
    check_tensor("z", z, "b", channels, "h", "w", like=weight)
    if model.use_tiling:
        check_tiling(model, max(z.shape[2:]), "tile_latent_min_size", "tile_sample_min_size")


def run_onload_hook(model: Any) -> None:
    """Move an offloaded model to its device, with imvar's hook, which PyTorch calls for `forward` alone."""
    for hook in model._forward_pre_hooks.values():
        if top_package(hook) == IMVAR:
            hook(model, ())


def check_tiling(model: Any, side: int, size_name: str, out_size_name: str) -> None:
    """Check that what is kept of each tile is the same share of the image before and after."""
    size, out_size = (check_int(name, getattr(model, name)) for name in (size_name, out_size_name))
    overlap = check_float("tile_overlap_factor", model.tile_overlap_factor)
    stride, keep = int(size * (1 - overlap)), out_size - int(out_size * overlap)
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    fits = stride >= 1 and stride * out_size == keep * size and max(size, out_size) == factor * min(size, out_size)
    if side > size and not fits:
        expected = f"tile sizes with a ratio of {factor} and an overlap of whole latents"
        got = f"{size}, {out_size_name}={out_size}, tile_overlap_factor={overlap:g}"
        raise invalid(InputError, size_name, expected, got)


def check_clip_inputs(model: Any, pixel_values: Any, *_: Any, **__: Any) -> None:
    """Check the images that the image encoder embeds."""
    check_pixels("pixel_values", pixel_values, model.vision_model)


def check_pixels(name: str, pixels: Any, vision_model: Any) -> None:
    """Check that images have the size of a vision model; as in the reference, of any floating-point dtype."""
    channels, weight = conv_spec(vision_model.embeddings.patch_embedding)
    check_tensor(name, pixels, "b", channels, "h", "w", like=weight, cast=True)
    size = vision_model.image_size, vision_model.image_size
    if pixels.shape[2:] != size:
        got = f"{tuple(pixels.shape[2:])}"
        raise invalid(InputError, name, f"images of size {size}", got, "CLIPImageProcessor resizes them")


def check_checker_inputs(model: Any, clip_input: Any, images: Any, *_: Any, **__: Any) -> None:
    """Check what the safety checker embeds, and that there are as many images."""
    check_pixels("clip_input", clip_input, model.vision_model)
    if images is None:  # for the flags alone
        return
    if not hasattr(images, "__len__") or isinstance(images, (str, bytes, dict, set)):
        raise invalid(InputTypeError, "images", "a tensor, an array or a list of images", type(images).__name__)
    if len(images) != len(clip_input):
        raise invalid(InputError, "images", f"{len(clip_input)}, as many as in clip_input", f"{len(images)}")
