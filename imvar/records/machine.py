"""The versions and the machine in a record."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from ..version import VERSION
from .values import as_json

UNKNOWN_MACHINE: dict[str, Any] = {"device": "unknown", "device_name": None, "dtype": {}, "threads": 0, "flags": {}}


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of imvar, of the libraries that images depend on, and of Python."""
    libraries = {"torch": torch, "Pillow": PIL, "numpy": np}
    own = {"imvar": VERSION, **{name: str(library.__version__) for name, library in libraries.items()}}
    return own | {"python": platform.python_version()}


def machine_of(device: torch.device, dtypes: Mapping[str, Iterable[torch.dtype]]) -> dict[str, Any]:
    """Return the device, the dtypes by model, the number of threads, and PyTorch's settings that change rounding."""
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "dtype": {name: "+".join(sorted(map(as_json, of_model))) for name, of_model in dtypes.items()},
        "threads": torch.get_num_threads(),
        "flags": flags_of(device),
    }


@functools.cache
def processor_name() -> str:
    """Return the name of the processor, and the instructions that PyTorch's kernels use of it."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


FLAGS: dict[str, Callable[[], Any]] = {
    "deterministic": torch.are_deterministic_algorithms_enabled,
    "float32_matmul_precision": torch.get_float32_matmul_precision,
    "default_dtype": torch.get_default_dtype,
    "mkldnn": lambda: torch.backends.mkldnn.enabled,
    "sdp": lambda: [
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    ],
}
CUDA_FLAGS: dict[str, Callable[[], Any]] = {
    "matmul_tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
    "matmul_reduced_precision": lambda: [
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    ],
    "cudnn": lambda: torch.backends.cudnn.enabled,
    "cudnn_tf32": lambda: torch.backends.cudnn.allow_tf32,
    "cudnn_benchmark": lambda: torch.backends.cudnn.benchmark,
    "cudnn_deterministic": lambda: torch.backends.cudnn.deterministic,
}


def flags_of(device: torch.device) -> dict[str, Any]:
    """Return the settings of PyTorch for the process that change how results are rounded on a device."""
    flags = {name: flag_value(flag) for name, flag in (FLAGS | (CUDA_FLAGS if device.type == "cuda" else {})).items()}
    if torch.is_autocast_enabled(device.type):
        flags["autocast"] = as_json(torch.get_autocast_dtype(device.type))
    return flags


def flag_value(flag: Callable[[], Any]) -> Any:
    """Return a setting; text where this PyTorch refuses to, as after a mixture of its older and newer settings."""
    try:
        return as_json(flag())
    except (AttributeError, RuntimeError) as error:
        return f"unknown ({type(error).__name__})"
