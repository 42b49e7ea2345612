"""The machine, the versions and the settings that the measurements depend on."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch

CPUINFO = Path("/proc/cpuinfo")
INSTRUCTION_SETS = re.compile(r"avx2|avx_vnni|avx512\w*|amx_\w+")


def cpuinfo(field: str) -> str:
    """Return a field of the first core, "" where Linux's /proc/cpuinfo does not exist or lacks it."""
    text = CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.exists() else ""
    match = re.search(rf"^{field}\s*: (.*)$", text, re.MULTILINE)
    return match[1] if match else ""


def processor() -> str:
    return cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_sets() -> str:
    """Return the vector and matrix instructions of the processor, by Linux's names."""
    found = [flag for flag in cpuinfo("flags").split() if INSTRUCTION_SETS.fullmatch(flag)]
    return " ".join(sorted(found)) or "unknown"


def commit() -> str:
    """Return the commit of the checkout, "unknown" without git or in a copy of the files alone."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    if shutil.which("git") is None:
        return "unknown"
    described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"


def machine(device: torch.device, *packages: str) -> dict[str, Any]:
    """Return the machine, the commit and the versions of Python, torch and `packages`."""
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "instruction sets": instruction_sets(),
        "cores": os.cpu_count(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: importlib.metadata.version(package) for package in packages},
    }


def environment(args: argparse.Namespace, *packages: str) -> dict[str, Any]:
    """Return the machine, the versions and the options of the command line."""
    return (
        machine(args.device, "diffusers", "transformers", *packages)
        | {
            "dtype": " ".join(args.dtype),
            "rounds": args.rounds,
            "threads": torch.get_num_threads(),
            "freed memory": "kept" if args.keep_memory else "returned to the system",
            "diffusers mode": args.reference,
            "imvar mode": args.compile,
        }
        | (cuda_settings() if args.device.type == "cuda" else {})
    )


@contextmanager
def setting(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give a setting of PyTorch another value inside the `with` block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def cuda_settings() -> dict[str, Any]:
    """Return the settings of PyTorch that change the kernels on CUDA."""
    return {
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "TF32 in matrix products": torch.backends.cuda.matmul.allow_tf32,
        "TF32 in convolutions": torch.backends.cudnn.allow_tf32,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }
