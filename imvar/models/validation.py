"""What the models can be called with: the one place that checks it, so that the models themselves need not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Conv2d

from ..checks import as_float, check_float, check_has_data, check_int, check_tensor
from ..errors import InputError, InputTypeError, describe, short_repr
from .stock import IMVAR, Precomputed, is_stock, top_package

MAX_TIMESTEP = 2**31  # far more than any model was trained for


def check_unet_inputs(
    model: Any, sample: Any, timestep: Any, encoder_hidden_states: Any, *_: Any, merge: Any = None, **__: Any
) -> None:
    """Latents, a time, and a context, of sizes that go together."""
    context, (channels, weight) = encoder_hidden_states, conv_spec(model.conv_in)
    check_tensor("sample", sample, "b", channels, "h", "w", like=weight)
    if not isinstance(context, Precomputed):
        check_tensor("encoder_hidden_states", context, "b", "m", context_width(model), like=weight)
        if len(context) % len(sample):
            raise InputError(
                f"encoder_hidden_states: {len(context)} came for {len(sample)} samples; one, or as many "
                "again, for each would do",
                key="encoder_hidden_states",
            )
    if not isinstance(timestep, Precomputed):
        if isinstance(timestep, Tensor) and not sample.is_meta:
            check_has_data("timestep", timestep)
        check_timestep(timestep, len(sample))
    if merge is not None and not callable(merge):
        raise InputTypeError(f"merge={short_repr(merge)}: a function of h, skip and the level would do", key="merge")


def conv_spec(layer: Any) -> tuple[int | str, Tensor | None]:
    """How many channels a layer takes, and its weight; not known where a fork has another layer, or its own hooks."""
    if not isinstance(layer, Conv2d) or not is_stock(layer) or not layer.weight.is_floating_point():
        return "c", None
    return layer.in_channels, layer.weight


def context_width(model: Any) -> int | str:
    """How wide a token of context is, by the layer that takes it; any number, where a fork has another layer there."""
    try:
        layer = model.mid.transformers[0].blocks[0].cross_attn.to_k
        return layer.in_features if is_stock(layer) else "c"
    except (AttributeError, IndexError):
        return "c"


def check_timestep(timestep: Any, samples: int) -> None:
    """A number, or one for each sample."""
    if isinstance(timestep, Tensor):
        if timestep.numel() != 1 and timestep.shape != (samples,):
            raise InputError(
                f"timestep: shape {tuple(timestep.shape)} came for {samples} samples; (), or ({samples},) would do",
                key="timestep",
            )
        if timestep.is_complex():
            raise InputTypeError(f"timestep: values of {timestep.dtype} came; numbers would do", key="timestep")
        if timestep.device.type != "cpu":
            return  # its value is not worth waiting for
        try:
            times = timestep.detach().flatten().tolist()
        except RuntimeError:  # while it is traced, there is none
            return
    else:
        times = [timestep]
    for one in times:
        if isinstance(one, (torch.SymInt, torch.SymFloat)):  # nor while it is traced
            continue
        number = as_float(one)
        if number is None:
            raise InputTypeError(
                f"timestep={short_repr(one)}: a number, or a tensor of one for each sample, would do", key="timestep"
            )
        if not 0 <= number <= MAX_TIMESTEP:
            raise InputError(f"timestep={short_repr(one)}: a finite number from 0 would do", key="timestep")


def check_attention_output(kernel: Any, answer: Any, q: Tensor) -> Tensor:
    """What an attention kernel, of whatever kind, answers to q."""
    if not isinstance(answer, Tensor) or answer.shape != q.shape:
        raise InputTypeError(
            f"attend={short_repr(kernel)}: it answered with {describe(answer)}; {tuple(q.shape)}, as q has it, would do",
            key="attend",
        )
    return answer


def check_encode_inputs(model: Any, x: Any, *_: Any, **__: Any) -> None:
    """What the autoencoder encodes."""
    run_onload_hook(model)
    channels, weight = conv_spec(model.encoder.conv_in)
    check_tensor("x", x, "b", channels, "h", "w", like=weight)
    least = 2 ** (len(model.config.block_out_channels) - 1)
    if min(x.shape[2:]) < least:
        raise InputError(f"x: pictures of {tuple(x.shape[2:])} came; from {least} pixels a side would do", key="x")
    if model.use_tiling:
        check_tiling(model, max(x.shape[2:]), "tile_sample_min_size", "tile_latent_min_size")


def check_decode_inputs(model: Any, z: Any, *_: Any, **__: Any) -> None:
    """What the autoencoder decodes."""
    run_onload_hook(model)
    channels, weight = conv_spec(model.post_quant_conv)
    check_tensor("z", z, "b", channels, "h", "w", like=weight)
    if model.use_tiling:
        check_tiling(model, max(z.shape[2:]), "tile_latent_min_size", "tile_sample_min_size")


def run_onload_hook(model: Any) -> None:
    """The weights to where an offloaded model works, by imvar's hook, which PyTorch calls for `forward` alone."""
    for hook in model._forward_pre_hooks.values():
        if top_package(hook) == IMVAR:
            hook(model, ())


def check_tiling(model: Any, side: int, taken: str, made: str) -> None:
    """Where a picture is cut, what is left of each tile has to be as much of the whole before as after."""
    sizes = [check_int(name, getattr(model, name)) for name in (taken, made)]
    overlap = check_float("tile_overlap_factor", model.tile_overlap_factor)
    stride, keep = int(sizes[0] * (1 - overlap)), sizes[1] - int(sizes[1] * overlap)
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    fits = stride >= 1 and stride * sizes[1] == keep * sizes[0] and max(sizes) == factor * min(sizes)
    if side > sizes[0] and not fits:
        raise InputError(
            f"{taken}={sizes[0]}, {made}={sizes[1]}, tile_overlap_factor={overlap:g}: tiles that do not "
            f"fit together; the one {factor} times the other, and an overlap of whole latents, would do",
            key=taken,
        )


def check_clip_inputs(model: Any, pixel_values: Any, *_: Any, **__: Any) -> None:
    """What the image encoder looks at."""
    check_pixels("pixel_values", pixel_values, model.tower)


def check_pixels(name: str, pixels: Any, tower: Any) -> None:
    """Pictures of the one size that a tower looks at; of any dtype of floats, as in the reference."""
    channels, weight = conv_spec(tower.patch)
    check_tensor(name, pixels, "b", channels, "h", "w", like=weight, cast=True)
    size = tower.image_size, tower.image_size
    if pixels.shape[2:] != size:
        raise InputError(
            f"{name}: pictures of {tuple(pixels.shape[2:])} came; this encoder looks at {size}, to which "
            "CLIPImageProcessor brings them",
            key=name,
        )


def check_checker_inputs(model: Any, clip_input: Any, images: Any, *_: Any, **__: Any) -> None:
    """What the safety checker looks at, and as many pictures."""
    check_pixels("clip_input", clip_input, model.tower)
    if images is None:  # who asks for the flags alone
        return
    if not hasattr(images, "__len__") or isinstance(images, (str, bytes, dict, set)):
        raise InputTypeError(
            f"images: {type(images).__name__} came; a tensor, an array or a list of pictures would do", key="images"
        )
    if len(images) != len(clip_input):
        raise InputError(
            f"images: {len(images)} came for {len(clip_input)} of clip_input; one each would do", key="images"
        )
