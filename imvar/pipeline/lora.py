"""LoRA (arXiv:2106.09685) of a pipeline: the adapters of its UNet, by the methods of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checks import as_path
from ..errors import InputError, InputTypeError, describe, invalid, short_repr
from ..models.lora import LoraMixin
from ..weights.lora import write_lora
from ..weights.model_index import unwrap
from ..weights.options import should_write

COMPONENTS = "unet", "text_encoder"  # which diffusers lists by default; there is no text encoder here


class LoraPipelineMixin:
    """Adapters are those of the UNet: pipelines that share it share them."""

    @property
    def _adapted(self) -> LoraMixin:
        unet = unwrap(getattr(self, "unet", None))
        if not isinstance(unet, LoraMixin):
            raise invalid(InputTypeError, "unet", "imvar's UNet2DConditionModel", describe(unet), "use its own methods")
        return unet

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight: float = 1.0,
        **options: Any,
    ) -> None:
        """Load an adapter of the UNet and make it the only active one, with this `weight`.

        A file, folder, hub repository or dictionary of tensors, in the format of diffusers, peft or kohya. Its sum
        with the weights takes their place, so that it costs no time in a call. `options`: `weight_name`, `subfolder`,
        `use_safetensors`, `revision`, `cache_dir`, `local_files_only` and `token`. `adapter_name`: by default
        "default_0" and so on; `hotswap` replaces the adapter of that name. Warns if the adapter was made for text
        prompts. Raises `CheckpointError` for a tensor that fits no layer.
        """
        self._adapted.load_lora_adapter(
            pretrained_model_name_or_path_or_dict, None, hotswap, adapter_name=adapter_name, weight=weight, **options
        )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        unet_lora_layers: Mapping[str, Tensor] | nn.Module | None = None,
        text_encoder_lora_layers: None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Any = None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: None = None,
    ) -> None:
        """Write an adapter, such as `get_peft_model_state_dict(unet)`, to a folder, for this pipeline and diffusers.

        `unet_lora_adapter_metadata`: its `LoraConfig` as a dictionary; without it, readers take alpha to be the rank.
        `save_function` has no effect. Raises `InputError` for layers of a text encoder, which this pipeline has not.
        """
        for name, value in {
            "text_encoder_lora_layers": text_encoder_lora_layers,
            "text_encoder_lora_adapter_metadata": text_encoder_lora_adapter_metadata,
        }.items():
            if value is not None:
                raise invalid(InputError, name, "None", describe(value), "this pipeline has no text encoder")
        layers = unet_lora_layers.state_dict() if isinstance(unet_lora_layers, nn.Module) else unet_lora_layers
        if not isinstance(layers, Mapping) or not layers:
            raise invalid(InputTypeError, "unet_lora_layers", "tensors by name", short_repr(layers))
        metadata = unet_lora_adapter_metadata or {}
        if should_write(is_main_process):
            write_lora(
                as_path("save_directory", save_directory),
                {f"unet.{key.removeprefix('base_model.model.')}": tensor for key, tensor in layers.items()},
                {f"unet.{key}": value for key, value in metadata.items()},
                weight_name=weight_name,
                safe_serialization=safe_serialization,
            )

    def unload_lora_weights(self) -> None:
        """Remove all adapters: the weights are bit for bit the original ones; those that are fused stay in them."""
        self._adapted.unload_lora()

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float | None] | None = None
    ) -> None:
        """Make these the active adapters, with one weight for all or one for each; None is 1."""
        self._adapted.set_adapters(adapter_names, adapter_weights)

    def get_active_adapters(self) -> list[str]:
        """Return the names of the active adapters."""
        return self._adapted.active_adapters() if self._adapted.adapter_names() else []

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of all adapters, under "unet"; an empty dictionary without any."""
        names = self._adapted.adapter_names()
        return {"unet": names} if names else {}

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters; if no active one is left, the first one becomes active, with a warning."""
        self._adapted.delete_adapters(adapter_names)

    def enable_lora(self) -> None:
        """Use the active adapters again after `disable_lora`."""
        self._adapted.enable_lora()

    def disable_lora(self) -> None:
        """Use no adapter until `enable_lora`."""
        self._adapted.disable_lora()

    def fuse_lora(
        self,
        components: Sequence[str] = COMPONENTS,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Make adapters, by default the active ones, part of the UNet's weights: these are then saved and trained."""
        if "unet" in check_component_names(components):
            self._adapted.fuse_lora(lora_scale, safe_fusing, adapter_names)

    def unfuse_lora(self, components: Sequence[str] = COMPONENTS) -> None:
        """Undo `fuse_lora`, except for its `lora_scale`."""
        if "unet" in check_component_names(components):
            self._adapted.unfuse_lora()


def check_component_names(names: Sequence[str]) -> Sequence[str]:
    if not names or not set(names) <= set(COMPONENTS):
        raise invalid(InputError, "components", f"a list of {' or '.join(COMPONENTS)}", short_repr(names))
    return names
