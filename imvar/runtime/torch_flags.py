"""PyTorch's settings for the process that change how results are rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

FLAGS: dict[str, Callable[[], Any]] = {
    "deterministic": torch.are_deterministic_algorithms_enabled,
    "float32_matmul_precision": torch.get_float32_matmul_precision,
    "default_dtype": torch.get_default_dtype,
    "mkldnn": lambda: torch.backends.mkldnn.enabled,
    "sdp": lambda: (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    ),
}
CUDA_FLAGS: dict[str, Callable[[], Any]] = {
    "matmul_tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
    "matmul_reduced_precision": lambda: (
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    ),
    "cudnn": lambda: torch.backends.cudnn.enabled,
    "cudnn_tf32": lambda: torch.backends.cudnn.allow_tf32,
    "cudnn_benchmark": lambda: torch.backends.cudnn.benchmark,
    "cudnn_deterministic": lambda: torch.backends.cudnn.deterministic,
}


def flags_of(device: torch.device) -> dict[str, Any]:
    """Return the settings that apply to a device, with the dtype of autocast if it is enabled."""
    flags = {name: flag_value(flag) for name, flag in (FLAGS | (CUDA_FLAGS if device.type == "cuda" else {})).items()}
    if torch.is_autocast_enabled(device.type):
        flags["autocast"] = torch.get_autocast_dtype(device.type)
    return flags


def flag_value(flag: Callable[[], Any]) -> Any:
    """Return a setting; text where this PyTorch refuses to, as after a mixture of its older and newer settings."""
    try:
        return flag()
    except (AttributeError, RuntimeError) as error:
        return f"unknown ({type(error).__name__})"
