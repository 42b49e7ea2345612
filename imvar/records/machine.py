"""The versions and the machine in a record."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from ..runtime.torch_flags import flags_of
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
        "flags": as_json(flags_of(device)),
    }


@functools.cache
def processor_name() -> str:
    """Return the name of the processor, and the instructions that PyTorch's kernels use of it."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
