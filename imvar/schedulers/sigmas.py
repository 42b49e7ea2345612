"""Ways to space noise levels: numpy, float64, from the noisiest down."""

from __future__ import annotations

import math

import numpy as np


def karras(high: float, low: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Evenly spaced in sigma^(1/rho), equation 5 of arXiv:2206.00364."""
    first, last = high ** (1 / rho), low ** (1 / rho)
    return (first + np.linspace(0, 1, steps) * (last - first)) ** rho


def exponential(high: float, low: float, steps: int) -> np.ndarray:
    """Evenly spaced in log sigma."""
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def beta(high: float, low: float, steps: int) -> np.ndarray:
    """Spaced as the quantiles of Beta(0.6, 0.6), close at both ends: arXiv:2407.12173."""
    return low + beta_quantile(1 - np.linspace(0, 1, steps), 0.6) * (high - low)


def beta_quantile(p: np.ndarray, a: float) -> np.ndarray:
    """Where the distribution function of Beta(a, a) reaches p.

    In y = x^a the function is y times a power series in x, nearly straight up to x = 1/2, so that Newton's
    method settles in a few rounds; the other half is its mirror image.
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


def to_timesteps(sigmas: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The fractional training timesteps of noise levels, linear in log sigma between those of `table`."""
    log, logs = np.log(np.maximum(sigmas, 1e-10)), np.log(table)
    i = (np.searchsorted(logs, log, side="right") - 1).clip(0, len(logs) - 2)
    part = ((logs[i] - log) / (logs[i] - logs[i + 1])).clip(0, 1)
    return (1 - part) * i + part * (i + 1)
