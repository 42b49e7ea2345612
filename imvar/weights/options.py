"""What loading and saving can be asked for, beside the settings of a part."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from ..checks import as_path, check_type
from ..errors import InputError, InputTypeError, short_repr
from .hub import Hub, locate

SAVE_OPTIONS = {"safe_serialization", "variant", "max_shard_size", "is_main_process", "save_function"}
READ_OPTIONS = {
    "use_safetensors",
    "disable_mmap",
    "low_cpu_mem_usage",
}  # how to read a file, which the file decides here


def locate_config(config: str | Path | None, hub: Hub, subfolder: str | None = None) -> Path | None:
    """The folder that `config=` names: itself, that of a file in it, or of a hub repository."""
    if config is None:
        if check_type("subfolder", subfolder, str):
            raise InputError(
                f"subfolder={short_repr(subfolder)}: is that of config, which did not come", key="subfolder"
            )
        return None
    path = as_path("config", config)
    folder = path.parent if os.path.isfile(path) else locate(path, hub, lambda _: ["*.json", "*/*.json"])
    return folder / (check_type("subfolder", subfolder, str) or "")


def resolve_ema(ema: str, extract_ema: bool | None) -> str:
    return ema if check_type("extract_ema", extract_ema, bool) is None else "yes" if extract_ema else "no"


def should_write(is_main_process: bool | None) -> bool:
    """Whether this process is the one of a distributed run that writes; it is, unless it is said not to be."""
    return check_type("is_main_process", is_main_process, bool) is not False


def filter_kwargs(options: Mapping[str, Any], known: Container[str], where: str) -> dict[str, Any]:
    """The known ones of `options`. One that is unknown may be there only to say None or False: diffusers has many."""
    odd = {name for name, value in options.items() if name not in known and value is not None and value is not False}
    if odd:
        raise InputTypeError(f"{where}: {min(odd)!r} is no part, setting or option here; leave it out")
    return {name: value for name, value in options.items() if name in known}
