"""`imvar env`: versions, hardware and settings, for a bug report. No path, user name or token is among them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from .. import __version__
from ..choices import CHECKPOINT
from ..loading import pick_device, pick_dtype

REQUIRED = "torch", "safetensors", "huggingface_hub", "Pillow", "numpy", "einops"
OPTIONAL = "diffusers", "transformers", "peft", "accelerate", "torchvision", "xformers", "gradio", "shtab"
INSTRUCTIONS = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "neon", "sve")
VARIABLES = re.compile(r"(OMP|GOMP|KMP|MKL|OPENBLAS|TORCH|TORCHINDUCTOR|PYTORCH|CUDA|CUBLAS|NVIDIA|HF|TQDM|LC)_|LANG$")
HARMLESS = re.compile(r"(?!.*(TOKEN|HOME|CACHE|DIR|PATH|FILE|ENDPOINT|PROXY|USER|HOST))[A-Z0-9_]+=[\w.,:;+-]{0,60}")
"""A variable whose value is printed: one that is no place, name or secret."""


def run(args: argparse.Namespace) -> None:
    report = environment()
    if args.json:
        print(json.dumps(report, indent=2))
        return
    width = max(map(len, report)) + 2
    for name, value in report.items():
        print(f"{name:{width}}{as_text(value)}")


def environment() -> dict[str, Any]:
    """Return the report, as values of JSON."""
    device = pick_device("auto")
    return {
        "imvar": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: found for name in REQUIRED + OPTIONAL if (found := version(name)) or name in REQUIRED},
        "torch": {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "rocm": torch.version.hip,
            "mps": torch.backends.mps.is_available(),
        },
        "cpu": {
            "model": cpu_model(),
            "cores": os.cpu_count(),
            "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "instructions": instructions(),
        },
        "threads": {"within an operation": torch.get_num_threads(), "between": torch.get_num_interop_threads()},
        "gpus": gpus(),
        "chosen": {"device": str(device), "dtype": str(pick_dtype("auto", device)).removeprefix("torch.")},
        "hub": hub(),
        "output": {"encoding": sys.stdout.encoding, "terminal": sys.stdout.isatty()},
        "variables": variables(os.environ),
    }


def version(package: str) -> str | None:
    """Return the version of a package that is installed, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """Return the name of the processor."""
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def instructions() -> list[str]:
    """Return those instruction sets of the CPU that change the speed of networks."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # missing in the oldest supported PyTorch
    return [name for name in INSTRUCTIONS if capabilities.get(name)]


def gpus() -> list[dict[str, Any]]:
    """Return the CUDA devices: name, memory and compute capability."""
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {"name": gpu.name, "GB": round(gpu.total_memory / 1e9, 1), "capability": f"{gpu.major}.{gpu.minor}"}
        for gpu in devices
    ]


def hub() -> dict[str, Any]:
    """Return whether the hub's cache and the default checkpoint in it are there, not where."""
    cache = Path(constants.HF_HUB_CACHE)
    return {
        "cache": cache.is_dir(),
        "default checkpoint": (cache / f"models--{CHECKPOINT.replace('/', '--')}").is_dir(),
        "offline": bool(constants.HF_HUB_OFFLINE),
    }


def variables(environment: Any) -> dict[str, str]:
    """Return the environment variables that matter; values that may be private are "set"."""
    found = {name: value for name, value in sorted(environment.items()) if VARIABLES.match(name)}
    return {name: value if HARMLESS.fullmatch(f"{name}={value}") else "(set)" for name, value in found.items()}


def as_text(value: Any) -> str:
    """Return a value of the report in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {as_text(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(map(as_text, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
