"""Components of the pipeline: what each has to provide, and whether they fit together."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from ..errors import InputError, InputTypeError, describe, invalid, short_repr
from ..weights.model_index import OPTIONAL_COMPONENTS, unwrap

# A component may be any object with the methods and properties of its Protocol, which are checked before each call.


class VAELike(Protocol):
    """`decode(latents, return_dict=False)` returns a tuple that starts with images (b, 3, 8 h, 8 w) around [-1, 1]."""

    def decode(self, z: Tensor, /, return_dict: bool = True) -> Any: ...

    @property
    def config(self) -> Any: ...


class ImageEncoderLike(Protocol):
    """A call returns an object with `image_embeds` (b, c)."""

    def __call__(self, pixel_values: Tensor, /) -> Any: ...
    def parameters(self) -> Iterable[Tensor]: ...


class UNetLike(Protocol):
    """A call returns an object with `sample`, of the shape of the latents (b, c, h, w)."""

    def __call__(self, sample: Tensor, timestep: Any, /, encoder_hidden_states: Tensor) -> Any: ...

    @property
    def config(self) -> Any: ...


class SchedulerLike(Protocol):
    """`step` returns an object with `prev_sample`. `timesteps` is not checked, as it may be missing at first."""

    timesteps: Any  # a tensor or a list, after set_timesteps

    def set_timesteps(self, num_inference_steps: int, /, device: Any = None) -> None: ...
    def scale_model_input(self, sample: Tensor, timestep: Any, /) -> Tensor: ...
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, /) -> Any: ...

    @property
    def init_noise_sigma(self) -> float | Tensor: ...


class SafetyCheckerLike(Protocol):
    """A call returns the images, flagged ones replaced or not, and a flag for each."""

    def __call__(self, *, images: Any, clip_input: Tensor) -> tuple[Any, Any]: ...


class FeatureExtractorLike(Protocol):
    """A call returns an object with `pixel_values` (b, 3, s, s)."""

    def __call__(self, images: Any, *, return_tensors: Any) -> Any: ...


Own = TypeVar("Own")
Like = TypeVar("Like")


class Component(Generic[Own, Like]):
    """Type of an attribute that is read as imvar's own class, and may be set to anything with a Protocol's members.

    For type checkers alone: code that sets a component of its own class knows it, and other code gets the usual one.
    """

    def __get__(self, pipe: Any, owner: Any = None) -> Own: ...  # type: ignore[empty-body]
    def __set__(self, pipe: Any, component: Like) -> None: ...


PROTOCOLS = {  # and imvar's own class for it, for error messages
    "vae": (VAELike, "an AutoencoderKL"),
    "image_encoder": (ImageEncoderLike, "a CLIPVisionModelWithProjection"),
    "unet": (UNetLike, "a UNet2DConditionModel"),
    "scheduler": (SchedulerLike, "a scheduler with return_dict=True"),
    "safety_checker": (SafetyCheckerLike, "a StableDiffusionSafetyChecker or None"),
    "feature_extractor": (FeatureExtractorLike, "a CLIPImageProcessor"),
}


BATCHED_TIMESTEPS = ("DDPMWuerstchenScheduler",)  # classes of diffusers whose signature does not show it


def required_members(protocol: type) -> list[str]:
    """Return the methods and properties of a Protocol, in their order. Annotated attributes are not required.

    `isinstance` would not do this: from Python 3.12 on it overlooks what `__getattr__` provides.
    """
    return [name for name in vars(protocol) if name == "__call__" or not name.startswith("_")]


def required_components(components: Mapping[str, Any], output_type: Any) -> dict[str, Any]:
    """Return the components that a call uses: not those that a subclass adds, and no decoder for latents."""
    unused = ("vae", "safety_checker") if isinstance(output_type, str) and output_type == "latent" else ()
    return {name: value for name, value in components.items() if name in PROTOCOLS and name not in unused}


def device_of(components: Mapping[str, Any], default: torch.device) -> torch.device:
    """Return the device of the first component with weights."""
    return next((p.device for c in components.values() if isinstance(c, Module) for p in c.parameters()), default)


def check_components(components: Mapping[str, Any]) -> None:
    """Check that every component is an instance with the members that the pipeline uses, and not of another kind."""
    for name, component in components.items():
        if component is None and name in OPTIONAL_COMPONENTS:
            continue
        protocol, expected = PROTOCOLS[name]
        if isinstance(component, type):
            raise invalid(InputTypeError, name, expected, f"the class {component.__name__}", "pass an instance")
        missing = [member for member in required_members(protocol) if not hasattr(component, member)]
        part = getattr(type(unwrap(component)), "part", name)  # the role of one of imvar's classes
        if component is None:
            raise invalid(InputTypeError, name, expected, "None")
        if missing:
            raise invalid(InputTypeError, name, expected, f"{describe(component)}, which has no {missing[0]}")
        if part != name:
            raise invalid(InputTypeError, name, expected, f"{describe(component)}, which is for {part}")


def check_feature_extractor(safety_checker: Any, feature_extractor: Any) -> None:
    """Check that a safety checker has a feature extractor."""
    if safety_checker is not None and feature_extractor is None:
        hint = "pass one, or safety_checker=None"
        raise invalid(InputError, "feature_extractor", "a CLIPImageProcessor for the safety checker", "None", hint)


def check_compatible(components: Mapping[str, Any], output_type: str, unmodified_unet: bool) -> None:
    """Check, by the configs of imvar's own components, that the output of each is an input of the next.

    `unmodified_unet`: no hook or override sits between the latents and the UNet.
    """
    checker, extractor = components.get("safety_checker"), components.get("feature_extractor")
    unet_in, unet_out = (config_value(components["unet"], name) for name in ("in_channels", "out_channels"))
    vae_in, vae_out = (config_value(components["vae"], name) for name in ("latent_channels", "out_channels"))
    if unmodified_unet and unet_in != unet_out:
        got = f"in_channels={unet_in} and out_channels={unet_out}"
        raise invalid(InputError, "unet", "as many output as input channels", got)
    if not isinstance(output_type, str) or output_type == "latent":  # another type is refused later, by its name
        return
    if unet_out != vae_in and None not in (unet_out, vae_in):
        got = f"latent_channels={vae_in}"
        raise invalid(InputError, "vae", f"latent_channels={unet_out}, the UNet's out_channels", got)
    if vae_out not in (1, 3, None) and (checker or output_type == "pil"):
        hint = "use output_type='np' or 'pt' without a safety checker"
        expected = f"out_channels of 1 or 3 for output_type={output_type!r}"
        raise invalid(InputError, "vae", expected, f"out_channels={vae_out}", hint)
    check_feature_extractor(checker, extractor)
    image_size = config_value(config_value(checker, "vision_config", checker), "image_size")
    crop_size = config_value(extractor, "crop_size")
    crops = config_value(extractor, "do_center_crop") and isinstance(crop_size, Mapping)
    if image_size is not None and crops and set(crop_size.values()) != {image_size}:
        expected = f"a model for {dict(crop_size)}, the feature extractor's crop_size"
        raise invalid(InputError, "safety_checker", expected, f"one for {image_size} x {image_size} pixels")


def config_value(component: Any, name: str, default: Any = None) -> Any:
    """Return a config value of one of imvar's own components; `default` for third-party ones.

    Fields of third-party configs may mean something else.
    """
    config = getattr(component, "config", component)
    return getattr(config, name, default) if type(config).__module__.startswith("imvar.") else default


def check_timesteps(scheduler: SchedulerLike) -> None:
    """Check that `set_timesteps` has left timesteps."""
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or not len(timesteps):
        got = f"timesteps={short_repr(timesteps)} of {type(scheduler).__name__}"
        raise invalid(InputTypeError, "scheduler", "a tensor or list of timesteps after set_timesteps", got)


def check_step(scheduler: SchedulerLike, options: Mapping[str, Any]) -> None:
    """Check that a step of the scheduler can do with a model output, a timestep, a sample and the `options`."""
    name, expected = type(scheduler).__name__, "one whose step takes a model output, a timestep and a sample"
    if name in BATCHED_TIMESTEPS:
        raise invalid(InputTypeError, "scheduler", expected, f"{name}, whose step takes a timestep per sample")
    try:
        inspect.signature(scheduler.step).bind(None, None, None, **options)
    except TypeError as error:  # of the arguments
        raise invalid(InputTypeError, "scheduler", expected, f"{name} ({error} of its step)") from error


def check_context(context: Any, batch: int, unet: Any = None, name: str = "image_encoder") -> None:
    """Check that the context is (k batch, m, c), with c the width of cross-attention if `unet` is one of imvar's.

    `name`: what it is made from.
    """
    if not isinstance(context, Tensor) or context.ndim != 3 or not len(context) or len(context) % batch:
        hint = "under guidance half of the batch is zeros"
        raise invalid(InputTypeError, name, f"a context ({batch}, 1, width)", describe(context), hint)
    width = config_value(unet, "cross_attention_dim")
    if width is not None and context.shape[-1] != width:
        expected = f"embeddings as wide as the UNet's cross_attention_dim={width}"
        raise invalid(InputError, name, expected, f"embeddings of width {context.shape[-1]}")


def require_tensor(component: Any, name: str, output: Any, field: str) -> Tensor:
    """Return the tensor `field` of a component's output."""
    value = getattr(output, field, None)
    if not isinstance(value, Tensor):
        got = f"{type(output).__name__} from {type(component).__name__}"
        raise invalid(InputTypeError, name, f"an output with a tensor `{field}`", got, f"use {PROTOCOLS[name][1]}")
    return value


def check_devices(components: Mapping[str, Any], may_differ: bool = False) -> None:
    """Check that weights are in memory and on one device, except those that a hook may move or move inputs to."""
    devices = {
        name: parameter.device
        for name, component in components.items()
        if isinstance(component, Module) and not component._forward_pre_hooks and "forward" not in vars(component)
        for parameter in islice(component.parameters(), 1)
    }
    got = ", ".join(f"{name} on {device}" for name, device in devices.items())
    if len(set(devices.values())) > 1 and not may_differ:
        raise invalid(InputError, "components", "one device", f"different devices ({got})", "call pipe.to(device)")
    if any(device.type == "meta" for device in devices.values()):
        raise invalid(InputError, "components", "weights in memory", got, "load them with from_pretrained")
