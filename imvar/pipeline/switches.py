"""The pipeline in a record: its components, its switches, and everything that other code changed about them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..models.attention import Attention
from ..models.stock import IMVAR, OWN, method_names, reasons_for_plain, top_package
from ..records.values import as_json
from ..runtime.fp8 import Fp8Linear
from ..runtime.int8 import Int8Layer
from ..weights.origin import layers_of
from .components import PROTOCOLS

MAX_REASONS = 3  # of one model
TILES = ("tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor")
TABLES = ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod")  # of schedulers
REPRODUCIBLE_BACKENDS = (None, "inductor", "eager", "aot_eager", "cudagraphs")


Models = Mapping[str, Sequence[nn.Module]]
"""The components of a call that are torch modules: by name, all layers, of which the first is the component itself."""


def models_of(pipe: Any) -> Models:
    """Return the models of a pipeline, those aside that a subclass adds."""
    components = {name: component for name, component in pipe.components.items() if name in PROTOCOLS}
    return {name: layers_of(model) for name, model in components.items() if isinstance(model, nn.Module)}


def scheduler_of(pipe: Any) -> dict[str, Any]:
    """Return the class and config of the scheduler; without -infinity, a default that JSON cannot represent."""
    scheduler = pipe.components["scheduler"]
    config = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
    return {
        "class": type(scheduler).__name__,
        "config": as_json({name: value for name, value in config.items() if value != -math.inf}),
    }


def switches_of(pipe: Any, models: Models) -> dict[str, Any]:
    """Return the classes and configs of the other components, and the switches that are on."""
    unet, vae, compiler = pipe.components["unet"], pipe.components["vae"], pipe._compiler
    freeu, adapters = getattr(unet, "freeu", None), getattr(unet, "_adapters", None)
    switches = {
        "components": {name: summary(part) for name, part in parts_of(pipe).items() if name != "scheduler"},
        "freeu": freeu and asdict(freeu),
        "vae_slicing": getattr(vae, "use_slicing", False),
        "vae_tiling": getattr(vae, "use_tiling", False) and {name: getattr(vae, name) for name in TILES},
        "attention_slicing": by_model(models, lambda layer: layer.slice_size),
        "attention_backend": by_model(models, lambda layer: layer.backend and kernel_name(layer.backend)),
        "channels_last": [name for name, layers in models.items() if has_channels_last(layers)],
        "fp8": any(isinstance(layer, Fp8Linear) for layer in models.get("unet", ())),
        "int8": any(isinstance(layer, Int8Layer) for layer in models.get("unet", ())),
        "compiled": compiler and {name: value for name, value in compiler.options.items() if value is not None},
        "offload": pipe._offload and pipe._offload.device.type,
        "lora": adapters and (adapters.fused or {name: adapters.scales[name] for name in adapters.active}),
    }
    return {name: as_json(value) for name, value in switches.items() if value}


def parts_of(pipe: Any) -> dict[str, Any]:
    """Return the components and what else the pipeline computes images with."""
    return {**pipe.components, "image_processor": pipe.image_processor}


def summary(component: Any) -> dict[str, str] | None:
    """Return the class of a component and the digest of its config; None for one that is left out."""
    if component is None:
        return None
    config = getattr(component, "config", component)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    entries = config if isinstance(config, Mapping) else {}
    text = json.dumps({str(k): as_json(v) for k, v in entries.items() if str(k)[:1] != "_"}, sort_keys=True)
    return {"class": type(component).__name__, "config": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"}


def by_model(models: Models, setting: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a setting of attention layers by model: one value if all layers have it, else a list of all."""
    found = {
        name: [setting(layer) for layer in layers if isinstance(layer, Attention)] for name, layers in models.items()
    }
    set_anywhere = {name: values for name, values in found.items() if any(values)}
    return {name: values[0] if len(set(values)) == 1 else values for name, values in set_anywhere.items()}


def kernel_name(kernel: Any) -> str:
    """Return the name of an attention kernel: of its backend, its function or its class."""
    backend = getattr(kernel, "name", None)
    return getattr(backend, "name", None) or getattr(kernel, "__name__", type(kernel).__name__)


def has_channels_last(layers: Sequence[nn.Module]) -> bool:
    """Return whether a convolution has its weight in the channels_last memory format."""
    weights = (layer._parameters.get("weight") for layer in layers if isinstance(layer, nn.Conv2d))
    return any(weight is not None and not weight.is_contiguous() for weight in weights)


# What keeps an image from being made again


def reasons_of_pipeline(pipe: Any, models: Models) -> Iterator[str]:
    """Yield what other code changed about the pipeline and its components, and kernels that are chosen by the clock."""
    for name, value in {"pipeline": pipe, **parts_of(pipe)}.items():
        if value is not None and top_package(type(value)) != IMVAR:
            yield f"{name}: {type(value).__name__} is a custom class"
        elif name in models:
            yield from (f"{name}: {reason}" for reason in changes_of_model(models[name]))
        elif value is not None:
            own = method_names(type(value)) & vars(value).keys() - {"progress_bar"}
            yield from (f"{name}: its own {method}" for method in sorted(own))
            if name == "scheduler":
                yield from (f"scheduler: its {table} changed" for table in changed_tables(value))
    if torch.is_autocast_enabled(pipe._execution_device.type):
        yield "autocast: torch.autocast is on"
    on_cuda, compiler = pipe._execution_device.type == "cuda", pipe._compiler
    if compiler is not None and pipe._offload is None:
        if on_cuda or "max-autotune" in (compiler.options.get("mode") or ""):
            yield "compile: kernels are chosen by the clock"
        if compiler.options.get("backend") not in REPRODUCIBLE_BACKENDS:
            yield "compile: a custom backend"
    if on_cuda and torch.backends.cudnn.benchmark:
        yield "cudnn.benchmark: kernels are chosen by the clock"


def changed_tables(scheduler: Any) -> Iterator[str]:
    """Yield the names of a scheduler's tables that are not those of its config."""
    fresh = type(scheduler).from_config(scheduler.config)
    for name in TABLES:
        table, expected = (getattr(each, name, None) for each in (scheduler, fresh))
        if isinstance(table, Tensor) and isinstance(expected, Tensor):
            table, expected = table.tolist(), expected.tolist()
        if table != expected:
            yield name
    if "init_noise_sigma" in vars(scheduler):
        yield "init_noise_sigma"


def changes_of_model(layers: Sequence[nn.Module]) -> list[str]:
    """Return what other code changed about a model, at most `MAX_REASONS` of it; fast paths may run around some."""
    model = layers[0]
    kinds = {kind for kind in set(map(type, layers)) if top_package(kind) not in OWN}
    kernels = [kernel for layer in layers if isinstance(layer, Attention) and (kernel := layer.custom_kernel)]
    found = [f"{kind.__name__} is a custom class" for kind in kinds]
    found += [f"{kernel_name(kernel)} is a custom kernel" for kernel in kernels]
    if (merge := getattr(model, "merge", None)) is not None and top_package(merge) != IMVAR:
        found.append(f"{kernel_name(merge)} is a custom merge")
    found = sorted(set(found)) + [reason for reason in reasons_for_plain(model) if reason not in found]
    more = [f"{len(found) - MAX_REASONS} more changes"] if len(found) > MAX_REASONS else []
    return found[:MAX_REASONS] + more
