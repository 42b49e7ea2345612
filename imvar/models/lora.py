"""LoRA (arXiv:2106.09685): adapters of low rank for the linear and convolutional layers of a model.

Loaded adapters are added to the weights, w = w0 + sum_i s_i alpha_i / r_i B_i A_i, in float32 and cast once, so that
the layers and every fast path stay. w0 is kept, so that the same bits return when they are removed. Adapters for
training, those of `add_adapter`, are layers of peft around the model's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..checks import as_path, check_finite, check_type
from ..errors import InputError, InputTypeError, describe, invalid, short_repr, warn_user
from ..weights.lora import OPTIONS, LoraLayer, read_lora, write_lora
from ..weights.options import filter_kwargs
from ..weights.pretrained import PretrainedModel
from ..weights.writing import is_finite
from .layers import replace_layers

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer dtypes by size in bytes


@dataclass(frozen=True)
class LoadedAdapters:
    """The loaded adapters of a model, by name: their layers, their scales, and which are active.

    `fused` ones, with their scales at that time, take the place of the active ones until they are unfused.
    `originals`: by layer, the weight without adapters, on the CPU. `checksums`: of the weights with the adapters.
    """

    layers: dict[str, dict[str, LoraLayer]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    enabled: bool = True
    fused: dict[str, float] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)

    def added(self) -> list[tuple[float, dict[str, LoraLayer]]]:
        """Return the adapters that are in the weights, each with its scale."""
        scales = self.fused or {name: self.scales[name] for name in self.active if self.enabled}
        return [(scale, self.layers[name]) for name, scale in scales.items() if scale]

    def write_into(self, layers: Mapping[str, Any], originals: Mapping[str, Tensor]) -> dict[str, int]:
        """Write the weights of `layers` in place: `originals` with the adapters added. Return their checksums."""
        for name, original in originals.items():
            weight = layers[name].weight
            total = original.to(weight.device, torch.promote_types(original.dtype, torch.float32))
            updates = [(scale, adapter[name]) for scale, adapter in self.added() if name in adapter]
            with torch.autocast(weight.device.type, enabled=False):
                total = sum((scale * update.delta(total) for scale, update in updates), start=total)
            value = total.to(original.dtype) if updates else original  # bit for bit
            if updates and not is_finite(value):
                expected, hint = f"values within {value.dtype} with the adapters", "lower their weights"
                raise invalid(InputError, f"{name}.weight", expected, "infinity or NaN", hint)
            if weight.is_inference():  # which PyTorch does not write to in place, or does not count it
                layers[name].weight = nn.Parameter(value.to(weight.device, copy=True), weight.requires_grad)
            else:
                weight.copy_(value)
        return {name: checksum(layers[name].weight) for name in originals}


class LoraMixin(PretrainedModel):
    """The adapters of a model, by the methods of diffusers' `PeftAdapterMixin`."""

    _adapters = LoadedAdapters()

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        prefix: str | None = "transformer",
        hotswap: bool = False,
        *,
        adapter_name: str | None = None,
        weight: float = 1.0,
        **options: Any,
    ) -> None:
        """Load an adapter from a file of diffusers, peft or kohya, and make it the only active one, with this `weight`.

        `options`: `weight_name`, `subfolder`, `use_safetensors`, `revision`, `cache_dir`, `local_files_only`, `token`.
        If keys begin with `prefix`, only these are read. `adapter_name`: by default "default_0" and so on. `hotswap`
        replaces the adapter of that name. Raises `CheckpointError` for a tensor that fits no layer of this model.
        """
        options = filter_kwargs(options, OPTIONS | {"low_cpu_mem_usage"}, "load_lora_adapter")
        options.pop("low_cpu_mem_usage", None)  # has no effect
        if hasattr(self, "peft_config"):
            hint = "save it with save_lora_adapter(), then call unload_lora()"
            raise invalid(InputError, "load_lora_adapter", "a model without an adapter for training", "one with", hint)
        loaded, weights = self.unfused(), {name: layer.weight for name, layer in adaptable_layers(self).items()}
        if check_type("adapter_name", adapter_name, str) is None:
            names = (f"default_{i}" for i in count(len(loaded.layers)))
            adapter_name = next(name for name in names if name not in loaded.layers)
        if (adapter_name in loaded.layers) != bool(check_type("hotswap", hotswap, bool)):
            expected = "the name of a loaded adapter" if hotswap else "a name that no adapter has"
            raise invalid(InputError, "adapter_name", expected, short_repr(adapter_name))
        scales = loaded.scales | {adapter_name: check_finite("weight", weight)}
        adapter = read_lora(pretrained_model_name_or_path_or_dict, self.keymap, weights, prefix=prefix, **options)
        layers = loaded.layers | {adapter_name: adapter}
        self.update_weights(replace(loaded, layers=layers, scales=scales, active=[adapter_name]))

    def save_lora_adapter(
        self,
        save_directory: str | Path,
        adapter_name: str = "default",
        upcast_before_saving: bool = False,
        safe_serialization: bool = True,
        weight_name: str | None = None,
    ) -> None:
        """Write one adapter, and its alpha, to `pytorch_lora_weights.safetensors` or `weight_name` in a folder."""
        (name,) = self.check_adapter_names(adapter_name)
        if layers := self._adapters.layers.get(name):
            tensors = {f"{layer}.lora_A.weight": update.down for layer, update in layers.items()}
            tensors |= {f"{layer}.lora_B.weight": update.up for layer, update in layers.items()}
            ranks = {f"^{layer}": len(update.down) for layer, update in layers.items()}
            alphas = {f"^{layer}": len(update.down) * update.scale for layer, update in layers.items()}
            config = {"r": 1, "lora_alpha": 1, "rank_pattern": ranks, "alpha_pattern": alphas}
            config["target_modules"] = list(layers)
        else:
            tensors = import_peft().get_peft_model_state_dict(self, adapter_name=name)
            config = self.peft_config[name].to_dict()  # type: ignore[union-attr, operator]
        write_lora(
            as_path("save_directory", save_directory),
            {name: tensor.float() if upcast_before_saving else tensor for name, tensor in tensors.items()},
            config,
            weight_name=weight_name,
            safe_serialization=safe_serialization,
        )

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Add an adapter for training, by a `LoraConfig` of peft, and freeze the model's own weights.

        Until `unload_lora` the model runs without its faster paths. Raises `InputError` if peft is not installed.
        """
        peft = import_peft()
        if self._adapters.layers:
            hint = "call unload_lora() first, after fuse_lora() to keep them in the weights"
            raise invalid(InputError, "add_adapter", "a model without loaded adapters", "one with", hint)
        if not isinstance(adapter_config, peft.PeftConfig):
            raise invalid(InputTypeError, "adapter_config", "a config of peft", describe(adapter_config))
        if check_type("adapter_name", adapter_name, str) in self.adapter_names():
            raise invalid(InputError, "adapter_name", "a name that no adapter has", short_repr(adapter_name))
        adapter_config.base_model_name_or_path = None
        peft.inject_adapter_in_model(adapter_config, self, adapter_name)
        self.set_adapter(adapter_name)

    def set_adapters(
        self, adapter_names: str | Sequence[str], weights: float | Sequence[float | None] | None = None
    ) -> None:
        """Make these the active adapters, with one weight for all or one for each; None is 1."""
        names = self.check_adapter_names(adapter_names)
        numbers = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(names)
        if len(numbers) != len(names):
            raise invalid(InputError, "weights", f"{len(names)}, one per adapter", str(len(numbers)))
        pairs = zip(names, numbers, strict=True)
        self.activate(names, {name: check_finite("weights", 1.0 if n is None else n) for name, n in pairs})

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make these the active adapters, with the weights that they have."""
        self.activate(self.check_adapter_names(adapter_name), {})

    def activate(self, names: list[str], scales: dict[str, float]) -> None:
        for layer in self.trainable_layers():
            layer.set_adapter(names)
            for name, scale in scales.items():
                layer.set_scale(name, scale)
        if self._adapters.layers:
            self.update_weights(replace(self.unfused(), active=names, scales=self._adapters.scales | scales))

    def active_adapters(self) -> list[str]:
        """Return the names of the active adapters. Raises `InputError` if there is no adapter."""
        self.check_adapter_names([])
        return list(self._adapters.active if self._adapters.layers else self.trainable_layers()[0].active_adapters)

    def enable_lora(self, enabled: bool = True) -> None:
        """Use the active adapters again after `disable_lora`."""
        for layer in self.trainable_layers():
            layer.enable_adapters(enabled)
        if self._adapters.layers:
            self.update_weights(replace(self.unfused(), enabled=enabled))

    def disable_lora(self) -> None:
        """Use no adapter until `enable_lora`."""
        self.enable_lora(False)

    enable_adapters, disable_adapters = enable_lora, disable_lora

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters; if no active one is left, the first one becomes active, with a warning."""
        names = self.check_adapter_names(adapter_names)
        left = [name for name in self.adapter_names() if name not in names]
        if not left:
            self.unfused()
            return self.unload_lora()
        if self._adapters.layers:
            active = [name for name in self._adapters.active if name in left]
            if not active:
                warn_user(f"delete_adapters: the active adapters were deleted; {left[0]} becomes active")
            layers = {name: self._adapters.layers[name] for name in left}
            self.update_weights(replace(self.unfused(), layers=layers, active=active or left[:1]))
        for layer, name in ((layer, name) for layer in self.trainable_layers() for name in names):
            layer.delete_adapter(name)
            self.peft_config.pop(name, None)  # type: ignore[union-attr, operator]

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Sequence[str] | None = None
    ) -> None:
        """Make adapters, by default the active ones, part of the model's weights, which are then saved and trained.

        `lora_scale` multiplies the weights of the active ones. Infinite weights are refused whatever `safe_fusing` is.
        """
        check_type("safe_fusing", safe_fusing, bool)
        factor = check_finite("lora_scale", lora_scale)
        names = None if adapter_names is None else self.check_adapter_names(adapter_names)
        for layer in self.trainable_layers():
            if factor != 1:
                layer.scale_layer(factor)
            layer.merge(safe_merge=safe_fusing, adapter_names=names)
        loaded = self._adapters
        if loaded.layers:
            scales = loaded.scales | {name: factor * loaded.scales[name] for name in loaded.active}
            names = (loaded.active if loaded.enabled else []) if names is None else names
            fused = {name: scales[name] for name in names} | loaded.fused
            self.update_weights(replace(loaded, scales=scales, fused=fused))

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`, except for its `lora_scale`."""
        for layer in self.trainable_layers():
            layer.unmerge()
        self.update_weights(replace(self._adapters, fused={}))

    def unload_lora(self) -> None:
        """Remove all adapters: the weights are bit for bit the original ones; those that are fused stay in them."""
        if hasattr(self, "peft_config"):
            tuner_layer = import_peft().tuners.tuners_utils.BaseTunerLayer
            replace_layers(self, tuner_layer, lambda layer: layer.get_base_layer())
            del self.peft_config
        if not self._adapters.fused:
            self.update_weights(LoadedAdapters(originals=self._adapters.originals))
        self._adapters = LoadedAdapters()

    # What these methods share

    def adapter_names(self) -> list[str]:
        """Return the names of all adapters."""
        return list(self._adapters.layers or getattr(self, "peft_config", ()))

    def check_adapter_names(self, names: str | Sequence[str]) -> list[str]:
        """Return names of adapters as a list. Raises `InputError` for an unknown one, and if there is no adapter."""
        known = self.adapter_names()
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
            raise invalid(InputTypeError, "adapter_names", "a string or a list of strings", short_repr(names))
        if not known:
            raise invalid(InputError, "adapter_names", "a model with adapters", "one without")
        if unknown := [name for name in names if name not in known]:
            raise invalid(InputError, "adapter_names", f"names among {', '.join(known)}", short_repr(unknown[0]))
        return list(names)

    def trainable_layers(self) -> list[Any]:
        """Return peft's layers: the adapters of `add_adapter`."""
        has_any = hasattr(self, "peft_config")
        return [layer for layer in self.modules() if hasattr(layer, "get_base_layer")] if has_any else []

    def unfused(self) -> LoadedAdapters:
        """Return the loaded adapters. Raises `InputError` if some are fused, as that would change their meaning."""
        if self._adapters.fused:
            got, hint = ", ".join(self._adapters.fused), "call unfuse_lora() first, or unload_lora() to keep them"
            raise invalid(InputError, "adapters", "no fused adapters", got, hint)
        return self._adapters

    @torch.inference_mode(False)
    @torch.no_grad()
    def update_weights(self, new: LoadedAdapters) -> None:
        """Write the weights with the adapters as in `new`: all of them or, after an error, none."""
        old, layers = self._adapters, adaptable_layers(self)
        if not old.checksums or new.added() != old.added():
            self.check_unchanged()
            names = {name for adapter in new.layers.values() for name in adapter}
            added = {name: layers[name].weight for name in sorted(names - new.originals.keys())}
            originals = new.originals | {name: copy_to_cpu(name, weight) for name, weight in added.items()}
            try:
                checksums = new.write_into(layers, originals)
            except BaseException:
                old.write_into(layers, originals)
                raise
            originals = {name: original for name, original in originals.items() if name in names}
            new = replace(new, originals=originals, checksums={name: checksums[name] for name in originals})
        self._adapters = new

    def check_unchanged(self) -> None:
        """Raise `InputError` if something else wrote to the weights since the adapters were added to them."""
        layers = adaptable_layers(self)
        for name, expected in self._adapters.checksums.items():
            if name not in layers or checksum(layers[name].weight) != expected:
                hint = "to keep the weights as they are, call fuse_lora(), then unload_lora() or unload_lora_weights()"
                raise invalid(InputError, f"{name}.weight", "what the adapters were added to", "a changed weight", hint)

    # What a model does otherwise while it has adapters

    def weights_to_save(self) -> dict[str, Tensor]:
        weights = super().weights_to_save()
        if hasattr(self, "peft_config"):
            warn_user("save_pretrained: adapters are not saved; save_lora_adapter() saves them")
            modules = {f"{name}.".replace("_orig_mod.", ""): module for name, module in self.named_modules()}
            wrapped = tuple(name for name, module in modules.items() if hasattr(module, "get_base_layer"))
            weights = {
                name.replace(".base_layer.", "."): weight
                for name, weight in weights.items()
                if ".base_layer." in name or not name.startswith(wrapped)
            }
        if self._adapters.layers and not self._adapters.fused:
            self.check_unchanged()
            warn_user("save_pretrained: the weights without the loaded adapters are saved; fuse_lora() adds them")
            weights |= {f"{name}.weight": original for name, original in self._adapters.originals.items()}
        return weights

    def train(self, mode: bool = True) -> Self:
        """Set training mode. Raises `InputError` if weights that adapters were added to require a gradient."""
        if mode and not self._adapters.fused:
            weights = {name: layer.weight for name, layer in adaptable_layers(self).items()}
            if any(weights[name].requires_grad for name in self._adapters.originals.keys() & weights):
                got, hint = ", ".join(self._adapters.layers), "call unload_lora(), fuse_lora() or requires_grad_(False)"
                raise invalid(InputError, "train", "a model without loaded adapters", got, hint)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **options: Any) -> Self:
        """Where `fn` casts, cast the weights without adapters and add these again, as if loaded afterwards."""
        originals = self._adapters.originals
        casts = any(fn(original.new_empty(0)).dtype != original.dtype for original in originals.values())
        if casts:
            self.check_unchanged()
        super()._apply(fn, *args, **options)
        if casts:
            layers = adaptable_layers(self)
            originals = {name: original.to(layers[name].weight.dtype) for name, original in originals.items()}
            self._adapters = replace(self._adapters, originals=originals, checksums={})
            self.update_weights(self._adapters)
        return self


def adaptable_layers(model: nn.Module) -> dict[str, Any]:
    """Return the linear and convolutional layers with a floating-point weight of their own, by name.

    The names are those without the wrappers of `torch.compile`.
    """
    layers: dict[str, Any] = {}
    for name, layer in model.named_modules():
        weight = layer._parameters.get("weight") if isinstance(layer, (nn.Linear, nn.Conv2d)) else None
        if weight is not None and weight.is_floating_point():
            layers[name.replace("_orig_mod.", "")] = layer
    return layers


def copy_to_cpu(name: str, weight: Tensor) -> Tensor:
    if weight.is_meta:
        raise invalid(InputError, f"{name}.weight", "a weight in memory", "one on the meta device")
    return weight.detach().to("cpu", copy=True)


def checksum(weight: Tensor) -> int:
    """Return the sum of the weight's bits as integers: cheap, and another one if anything was written to it."""
    return -1 if weight.is_meta else int(weight.detach().view(BITS[weight.element_size()]).sum(dtype=torch.int64))


def import_peft() -> Any:
    """Return the package peft. Raises `InputError` if it is not installed."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise invalid(InputError, "peft", "an installed package", str(error), "run `pip install peft`") from error
