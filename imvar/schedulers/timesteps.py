"""Noise schedules (betas), the spacing of sampling timesteps and the spacing of noise levels (sigmas)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_int
from ..errors import InputError, InputTypeError, invalid, short_repr


def make_betas(config: Any) -> Tensor:
    """Return the betas, the variance that each training timestep adds: (num_train_timesteps,) float32, on the CPU."""
    start, end, steps = config.beta_start, config.beta_end, config.num_train_timesteps
    if config.trained_betas is not None:
        return torch.tensor(np.asarray(config.trained_betas), dtype=torch.float32, device="cpu")
    if config.beta_schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float32, device="cpu")
    if config.beta_schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32, device="cpu") ** 2
    t = np.arange(steps + 1) / steps
    alpha = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2  # equation 17 of arXiv:2102.09672
    return torch.tensor(np.minimum(1 - alpha[1:] / alpha[:-1], 0.999), dtype=torch.float32, device="cpu")


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Rescale betas to zero terminal SNR, so that the last timestep is pure noise: algorithm 1 of arXiv:2305.08891."""
    signal = (1 - betas).cumprod(0).sqrt()
    first, last = signal[0], signal[-1]
    alpha = ((signal - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alpha[:1], alpha[1:] / alpha[:-1]])


def space_timesteps(config: Any, steps: int, skipped: int = 0) -> np.ndarray:
    """Return `steps` sampling timesteps, descending: table 2 of arXiv:2305.08891. Fractional for linspace.

    `skipped`: leave out as many at the end of the spacing, except of trailing, whose end is above 0.
    """
    total, spacing = config.num_train_timesteps, config.timestep_spacing
    steps = check_int("num_inference_steps", steps, high=total - skipped if spacing == "leading" else total)
    if spacing == "linspace":
        return np.linspace(0, total - 1, steps + skipped)[::-1][:steps]
    if spacing == "leading":
        return np.arange(steps + skipped)[::-1][:steps] * (total // (steps + skipped)) + config.steps_offset
    return np.arange(total, 0, -total / steps).round()[:steps] - 1  # rounding may give one more, timestep -1


def integer_timesteps(config: Any, steps: int, skipped: int = 0) -> np.ndarray:
    """Return `space_timesteps` rounded to integers. Raises `InputError` if the first is above the last of training."""
    total = config.num_train_timesteps
    timesteps = space_timesteps(config, steps, skipped).round().astype(np.int64)
    if timesteps[0] >= total:
        got = f"{len(timesteps)}, whose first timestep is {timesteps[0]} with steps_offset={config.steps_offset}"
        expected = f"steps within the training timesteps 0 to {total - 1}"
        raise invalid(InputError, "num_inference_steps", expected, got, "use fewer steps")
    return timesteps


def check_one_schedule(**given: Any) -> None:
    """Check that one of the arguments of `set_timesteps` that choose the schedule is given, at most."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise invalid(InputError, ", ".join(given), "one of them", " and ".join(names), key=names[0])


def descending(name: str, values: Any, high: float, least: int = 1) -> np.ndarray:
    """Return a caller's timesteps or noise levels, at least `least` descending numbers from 0 to `high`, as float64."""
    expected = f"a list of {least} or more descending numbers from 0 to {high:g}"
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise invalid(InputTypeError, name, expected, short_repr(values)) from error
    is_list = array.ndim == 1 and len(array) >= least
    if not is_list or not (np.diff(array) < 0).all() or not 0 <= array[-1] <= array[0] <= high:
        raise invalid(InputError, name, expected, short_repr(values))
    return array


# Spacings of the noise levels: numpy, float64, descending


def karras_sigmas(high: float, low: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Return sigmas evenly spaced in sigma^(1/rho): equation 5 of arXiv:2206.00364."""
    first, last = high ** (1 / rho), low ** (1 / rho)
    return (first + np.linspace(0, 1, steps) * (last - first)) ** rho


def exponential_sigmas(high: float, low: float, steps: int) -> np.ndarray:
    """Return sigmas evenly spaced in log sigma."""
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def beta_sigmas(high: float, low: float, steps: int) -> np.ndarray:
    """Return sigmas spaced as the quantiles of Beta(0.6, 0.6), dense at both ends: arXiv:2407.12173."""
    return low + beta_quantile(1 - np.linspace(0, 1, steps), 0.6) * (high - low)


def beta_quantile(p: np.ndarray, a: float) -> np.ndarray:
    """Return the quantiles of Beta(a, a) at the probabilities p.

    In y = x^a the cumulative distribution function is y times a power series in x, nearly linear up to x = 1/2, so that
    Newton's method converges in a few iterations; the upper half is symmetric.
    """
    n = np.arange(64)
    series = np.cumprod(np.where(n, (n - a) / np.maximum(n, 1), 1)) * a / (a + n)  # of (1 - x)^(a - 1), integrated
    target = np.minimum(p, 1 - p) * a * math.gamma(a) ** 2 / math.gamma(2 * a)
    y = target
    for _ in range(8):
        x = y ** (1 / a)
        y = y - (y * (series * x[:, None] ** n).sum(1) - target) * (1 - x) ** (1 - a)
    x = y ** (1 / a)
    return np.where(p < 0.5, x, 1 - x)


def to_timesteps(sigmas: np.ndarray, train_sigmas: np.ndarray) -> np.ndarray:
    """Return the fractional training timesteps of noise levels, interpolated in log sigma between `train_sigmas`."""
    log_sigmas, log_train = np.log(np.maximum(sigmas, 1e-10)), np.log(train_sigmas)
    i = (np.searchsorted(log_train, log_sigmas, side="right") - 1).clip(0, len(log_train) - 2)
    fraction = ((log_train[i] - log_sigmas) / (log_train[i] - log_train[i + 1])).clip(0, 1)
    return (1 - fraction) * i + fraction * (i + 1)
