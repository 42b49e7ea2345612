"""Options of loading and saving: which of diffusers' there are, and what they mean."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checks import Dtype, as_dtype, as_path, check_type
from ..errors import InputError, InputTypeError, invalid, short_repr
from .hub import Hub, locate
from .read_errors import kind_of

SAVE_OPTIONS = {"safe_serialization", "variant", "max_shard_size", "is_main_process", "save_function"}
READ_OPTIONS = {"use_safetensors", "low_cpu_mem_usage"}  # no effect on single files
IGNORED_OPTIONS = (  # by diffusers, or of use only together with options that are refused
    "resume_download",
    "mirror",
    "trust_remote_code",
    "output_loading_info",
    "offload_state_dict",
    "offload_folder",
    "max_memory",
)
REFUSED_OPTIONS = {  # with what to do instead
    "proxies": "set the environment variable HTTPS_PROXY",
    "device_map": "call .to(device) after loading, or enable_model_cpu_offload of a pipeline",
    "custom_pipeline": "call from_pretrained of your subclass of the pipeline",
}


def loading_options(
    options: Mapping[str, Any],
    revision: str | None,
    cache_dir: str | Path | None,
    local_files_only: bool | None,
    token: str | bool | None,
) -> tuple[Hub, dict[str, Any]]:
    """Return the options of a download, and those of `options` that are neither that nor without effect."""
    rest = {name: value for name, value in options.items() if name not in IGNORED_OPTIONS}
    for name, hint in REFUSED_OPTIONS.items():
        if (value := rest.pop(name, None)) is not None:
            raise invalid(InputError, name, "None", short_repr(value), hint)
    older_token = rest.pop("use_auth_token", None)
    if token is not None and older_token is not None:
        raise invalid(InputError, "use_auth_token", "None, as token is given", "both")
    token = older_token if token is None else token
    return Hub(revision, cache_dir, local_files_only, token, rest.pop("force_download", False)), rest


def locate_config(config: str | Path | None, hub: Hub, subfolder: str | None = None) -> Path | None:
    """Return the folder for `config=`: a local one, that of a local file, or a snapshot of a hub repository."""
    if config is None:
        if check_type("subfolder", subfolder, str):
            raise invalid(InputError, "subfolder", "None without config=", short_repr(subfolder))
        return None
    path = as_path("config", config)
    folder = path.parent if kind_of(path) == "file" else locate(path, hub, lambda _: ["*.json", "*/*.json"])
    return folder / (check_type("subfolder", subfolder, str) or "")


def resolve_dtype(torch_dtype: torch.dtype | str | None, dtype: torch.dtype | str | None) -> Dtype:
    """Return the dtype to load weights as: `dtype`, or `torch_dtype`, its older name, or float32."""
    return as_dtype(torch_dtype if dtype is None else dtype)


def resolve_ema(ema: str, extract_ema: bool | None) -> str:
    """Return `ema`, or "yes" or "no" if diffusers' `extract_ema` is given."""
    return ema if check_type("extract_ema", extract_ema, bool) is None else "yes" if extract_ema else "no"


def should_write(is_main_process: bool | None) -> bool:
    """Return whether this process writes: in a distributed run, only the main one."""
    return check_type("is_main_process", is_main_process, bool) is not False


def filter_kwargs(options: Mapping[str, Any], known: Container[str], where: str) -> dict[str, Any]:
    """Return the `known` ones of the keyword arguments `options` of the function `where`.

    Unknown ones may be None or False, as diffusers has many options that are then off.
    """
    used = [name for name, value in options.items() if value is not None and value is not False]
    if unknown := sorted(name for name in used if name not in known):
        expected, got = "a component, config field or option", f"unknown argument {unknown[0]!r}"
        raise invalid(InputTypeError, where, expected, got, "remove it", key=unknown[0])
    return {name: value for name, value in options.items() if name in known}
