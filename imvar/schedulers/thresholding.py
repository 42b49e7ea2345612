"""Limits to the predicted x_0 of a step: clipping and dynamic thresholding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import check_float


def dynamic_threshold(x0: Tensor, ratio: float, limit: float) -> Tensor:
    """Dynamic thresholding, section 2.3 of arXiv:2205.11487.

    Clip each sample of x_0 to the `ratio` quantile of its absolute values, at least 1 and at most `limit`, and divide
    by it.
    """
    x = x0 if x0.dtype == torch.float64 else x0.float()  # torch.quantile does not support half precision
    bound = x.flatten(1).abs().quantile(ratio, dim=1).clamp(1, limit)
    bound = bound.view(-1, *[1] * (x.ndim - 1))  # b -> b 1 1 1
    return (x.clamp(-bound, bound) / bound).to(x0.dtype)


def limit_denoised(config: Any, x0: Tensor) -> Tensor:
    """Apply `thresholding` or else `clip_sample` of a config to the predicted x_0."""
    if config.thresholding:
        return dynamic_threshold(x0, config.dynamic_thresholding_ratio, config.sample_max_value)
    return x0.clamp(-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else x0


def check_limits(config: Any) -> None:
    """Check the numbers that `limit_denoised` uses."""
    check_float("dynamic_thresholding_ratio", config.dynamic_thresholding_ratio)
    check_float("clip_sample_range", config.clip_sample_range, high=math.inf)
    check_float("sample_max_value", config.sample_max_value, high=math.inf)
