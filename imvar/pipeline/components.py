"""What the parts of a pipeline have to be, and whether they go together."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from torch import Tensor, device
from torch.nn import Module

from ..errors import InputError, InputTypeError, describe, short_repr
from ..weights.model_index import OPTIONAL_COMPONENTS

NEEDED = {  # of the part of this name
    "vae": ("decode", "config"),
    "image_encoder": ("__call__", "parameters"),
    "unet": ("__call__", "config"),
    "scheduler": ("set_timesteps", "scale_model_input", "step", "init_noise_sigma"),
    "safety_checker": ("__call__",),
    "feature_extractor": ("__call__",),
}
EXPECTED_TYPE = {
    "vae": "an AutoencoderKL",
    "image_encoder": "a CLIPVisionModelWithProjection",
    "unet": "a UNet2DConditionModel",
    "scheduler": "a scheduler with return_dict=True",
    "feature_extractor": "a CLIPImageProcessor",
    "safety_checker": "a StableDiffusionSafetyChecker, or None,",
}


def required_components(parts: Mapping[str, Any], output_type: Any) -> dict[str, Any]:
    """The parts that a call needs: not what a subclass has beside them, nor what latents alone go without."""
    spared = ("vae", "safety_checker") if isinstance(output_type, str) and output_type == "latent" else ()
    return {name: part for name, part in parts.items() if name in NEEDED and name not in spared}


def device_of(parts: Mapping[str, Any], default: device) -> device:
    """Where the first of these has its weights."""
    return next((p.device for part in parts.values() if isinstance(part, Module) for p in part.parameters()), default)


def check_components(parts: Mapping[str, Any]) -> None:
    """Every part that a call needs is there, and can do what is asked of a part of its name."""
    for name, part in parts.items():
        needed = NEEDED[name]
        if part is None and name in OPTIONAL_COMPONENTS:
            continue
        if isinstance(part, type):
            raise InputTypeError(f"{name}: the class {part.__name__} came; one made of it would do", key=name)
        lacking = [method for method in needed if not hasattr(part, method)]
        other = getattr(type(part), "part", name)  # what imvar's own are
        if lacking or other != name:
            came = (
                "None came"
                if part is None
                else f"a {type(part).__name__} came, which "
                + (f"has no {lacking[0]}" if lacking else f"is for {other}")
            )
            raise InputTypeError(f"{name}: {came}; {EXPECTED_TYPE[name]} would do", key=name)


def check_compatible(parts: Mapping[str, Any], output_type: str, whole: bool) -> None:
    """The parts go together, as far as their settings tell: what one makes is what the next one takes.

    `whole`: nobody has put anything between the UNet and its latents.
    """
    checker, extractor = parts.get("safety_checker"), parts.get("feature_extractor")
    unet_in, unet_out = (config_value(parts["unet"], name) for name in ("in_channels", "out_channels"))
    vae_in, vae_out = (config_value(parts["vae"], name) for name in ("latent_channels", "out_channels"))
    if whole and unet_in != unet_out:
        raise InputError(
            f"unet: its in_channels={unet_in} and out_channels={unet_out} differ; as many would do", key="unet"
        )
    if not isinstance(output_type, str) or output_type == "latent":  # what is no word is refused as such
        return
    if unet_out != vae_in and None not in (unet_out, vae_in):
        raise InputError(
            f"unet, vae: the UNet's out_channels={unet_out} and latent_channels={vae_in} differ; as many would do",
            key="vae",
        )
    if vae_out not in (1, 3, None) and (checker or output_type == "pil"):
        raise InputError(
            f"vae: out_channels={vae_out}; 1 or 3 would do for output_type={output_type!r}, or 'np' and "
            "'pt' with no safety checker",
            key="vae",
        )
    if checker and extractor is None:
        raise InputError(
            "feature_extractor=None: the safety checker needs one; pass it, or safety_checker=None",
            key="feature_extractor",
        )
    sees, side = (
        config_value(config_value(checker, "vision_config", checker), "image_size"),
        config_value(extractor, "crop_size"),
    )
    known = sees is not None and config_value(extractor, "do_center_crop") and isinstance(side, Mapping)
    if known and set(side.values()) != {sees}:
        raise InputError(
            f"safety_checker, feature_extractor: one looks at {sees} x {sees} pixels, and the other makes "
            f"{dict(side)}; one size would do",
            key="safety_checker",
        )


def config_value(part: Any, name: str, default: Any = None) -> Any:
    """A setting of a part of imvar's; of those of others nobody knows what it means."""
    config = getattr(part, "config", part)
    return getattr(config, name, default) if type(config).__module__.startswith("imvar.") else default


def check_timesteps(scheduler: Any) -> None:
    """It has timesteps to go by."""
    times = getattr(scheduler, "timesteps", None)
    if times is None or not len(times):
        raise InputTypeError(
            f"scheduler: set_timesteps left {type(scheduler).__name__} with timesteps={short_repr(times)}; "
            "a tensor or a list of them would do",
            key="scheduler",
        )


def check_context(context: Any, rows: int, unet: Any = None) -> None:
    """What the UNet is told of each picture is there, and as wide as its cross-attention expects, if it is imvar's."""
    if not isinstance(context, Tensor) or context.ndim != 3 or not len(context) or len(context) % rows:
        raise InputTypeError(
            f"image_encoder: {describe(context)} came as the context; a tensor ({rows}, 1, width) would "
            "do, under guidance with zeros for half of the rows",
            key="image_encoder",
        )
    width = config_value(unet, "cross_attention_dim")
    if width is not None and context.shape[-1] != width:
        raise InputError(
            f"image_encoder, unet: embeddings of {context.shape[-1]} numbers came to a UNet of "
            f"cross_attention_dim={width}; as many would do",
            key="image_encoder",
        )


def require_tensor(part: Any, name: str, output: Any, field: str) -> Tensor:
    """The tensor of this name in what a part, of whatever kind, returned."""
    value = getattr(output, field, None)
    if not isinstance(value, Tensor):
        raise InputTypeError(
            f"{name}: {type(part).__name__} returned {type(output).__name__} with no tensor in "
            f"`{field}`; {EXPECTED_TYPE[name]} would do",
            key=name,
        )
    return value


def check_devices(parts: Mapping[str, Any]) -> None:
    """One device for all parts that have weights, but for those that a hook may move or send their inputs to."""
    found = {
        name: parameter.device
        for name, part in parts.items()
        if isinstance(part, Module) and not part._forward_pre_hooks and "forward" not in vars(part)
        for parameter in islice(part.parameters(), 1)
    }
    if len(set(found.values())) > 1:
        where = ", ".join(f"{name} on {place}" for name, place in found.items())
        raise InputError(f"the parts are on different devices ({where}); pipe.to(device) brings them together")
    if any(place.type == "meta" for place in found.values()):
        raise InputError("the parts are on the meta device, so they have no weights; from_pretrained loads them")
