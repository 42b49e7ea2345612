"""Sampling by noise level: x = x_0 + sigma noise, the coordinates of arXiv:2206.00364, at any levels sigma."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import as_device, check_float, check_int, validated
from ..errors import InputError, invalid, short_repr, warn_user
from .common import Scheduler, check_noise_inputs
from .timesteps import beta_sigmas, exponential_sigmas, karras_sigmas, space_timesteps, to_timesteps

MAX_SIGMA = 1e9
SIGMA_SPACINGS = {
    "use_karras_sigmas": karras_sigmas,
    "use_exponential_sigmas": exponential_sigmas,
    "use_beta_sigmas": beta_sigmas,
}


def to_denoised(kind: str, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """Convert a model output at x = x_0 + sigma noise to the predicted x_0."""
    if kind == "epsilon":
        return x - sigma * output
    if kind == "v_prediction":
        return output * (-sigma / (sigma**2 + 1) ** 0.5) + x / (sigma**2 + 1)
    return output


def check_spacing(config: Any) -> None:
    """Check that a config has at most one of `SIGMA_SPACINGS`."""
    if (n := sum(bool(getattr(config, name)) for name in SIGMA_SPACINGS)) > 1:
        names = ", ".join(SIGMA_SPACINGS)
        raise invalid(InputError, names, "at most one to be True", str(n), key="use_karras_sigmas")


def check_no_spacing(config: Any, name: str) -> None:
    """Check that a config has none of `SIGMA_SPACINGS`, next to the argument `name`, which chooses the levels."""
    if spacing := next((key for key in SIGMA_SPACINGS if config[key]), None):
        raise invalid(InputError, name, f"None with {spacing}=True", "timesteps", "pass num_inference_steps")


class SigmaSpaceScheduler(Scheduler):
    """Base class of the schedulers that count their steps along a list of noise levels.

    Attributes: `sigmas`, (n + 1,) float32, the noise level of each timestep and the one after the last step, on the
    CPU; `step_index`, the index of the next step, None before the first; `begin_index`, the index of the first step,
    None to find it by its timestep. Before the first run these are the timesteps of training.
    """

    step_index: int | None = None
    begin_index: int | None = None

    def make_tables(self) -> None:
        super().make_tables()
        if self.config.rescales_betas:
            self.alphas_cumprod[-1] = 2**-24  # a noise level of 4096 instead of infinity
        self.train_sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().numpy()
        self.is_scale_input_called = False
        self.start_run(np.arange(len(self), dtype=np.float32)[::-1], self.train_sigmas[::-1])
        self.num_inference_steps = None

    def start_run(self, timesteps: np.ndarray, sigmas: np.ndarray, last: float = 0.0, device: Any = None) -> None:
        """Set the timesteps of a run, on `device`, and their noise levels, both (n,) and descending.

        `last` is the noise level after the last step.
        """
        self.timesteps = torch.from_numpy(timesteps.copy()).to(as_device("device", device))
        self.sigmas = torch.from_numpy(np.append(sigmas, last).astype(np.float32))
        self.num_inference_steps = len(timesteps)
        self.step_index = self.begin_index = None

    def space_levels(self, steps: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return `steps` timesteps by the config's `timestep_spacing`, and their noise levels, both (n,)."""
        timesteps = space_timesteps(self.config, steps).astype(np.float32)
        return timesteps, self.sigmas_at(timesteps)

    def sigmas_at(self, timesteps: np.ndarray) -> np.ndarray:
        """Return the noise levels of timesteps. Raises `InputError` where the betas leave no noise or no signal."""
        sigmas = np.interp(timesteps, np.arange(len(self)), self.train_sigmas)
        self.check_levels(sigmas)
        return sigmas

    def check_levels(self, sigmas: np.ndarray) -> None:
        usable = bool((np.isfinite(sigmas) & (sigmas > 0)).all())
        expected = f"betas that give {type(self).__name__} finite noise levels above 0"
        self.check_betas(usable, expected, f"noise levels from {sigmas.min():g} to {sigmas.max():g}")

    def respace(self, timesteps: np.ndarray, sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return as many timesteps and noise levels in the config's spacing of sigmas; the same without one."""
        spacing = next((space for name, space in SIGMA_SPACINGS.items() if self.config[name]), None)
        if spacing is None:
            return timesteps, sigmas
        self.check_levels(self.train_sigmas)
        sigmas = spacing(*self.sigma_range(spacing, sigmas), len(timesteps))
        return to_timesteps(sigmas, self.train_sigmas), sigmas

    def sigma_range(self, spacing: Any, sigmas: np.ndarray) -> tuple[float, float]:
        """Return the first and last level of a spacing: `sigma_max` and `sigma_min` if the config has them.

        They may be those of another scheduler's config, as in diffusers.
        """
        bounds = ("sigma_max", sigmas[0]), ("sigma_min", sigmas[-1])
        return tuple(  # type: ignore[return-value]
            check_float(name, self.config.get(name) or level, 1 / MAX_SIGMA, MAX_SIGMA) for name, level in bounds
        )

    @property
    def last_sigma(self) -> float:
        """The noise level after the last step: 0, or the lowest of training with `final_sigmas_type="sigma_min"`."""
        return float(self.train_sigmas[0]) if self.config["final_sigmas_type"] == "sigma_min" else 0.0

    @property
    def init_noise_sigma(self) -> Tensor | float:
        """Standard deviation of the initial noise, 0-d."""
        highest = self.sigmas.max()
        return (highest**2 + 1) ** 0.5 if self.config.timestep_spacing == "leading" else highest

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the next run at this index of `timesteps` instead of finding it by value."""
        self.begin_index = check_int("begin_index", begin_index, low=0, high=len(self.timesteps) - 1)

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Return the index of a timestep in `timesteps`, or in another schedule; if it repeats, the second.

        Raises `InputError` for a timestep that is not in it.
        """
        timesteps = self.timesteps if schedule_timesteps is None else schedule_timesteps
        indices = (timesteps == check_float("timestep", timestep, high=math.inf)).nonzero().flatten().tolist()
        if not indices:
            expected = f"one of scheduler.timesteps, from {timesteps[0]:g} down to {timesteps[-1]:g}"
            raise invalid(InputError, "timestep", expected, f"{float(timestep):g}")
        return indices[:2][-1]

    def find_step_index(self, timestep: float | Tensor) -> int:
        """Return the index of the current step: the first is found by its timestep, the others are counted."""
        if self.step_index is None and self.begin_index is not None:
            self.step_index = self.begin_index
        elif self.step_index is None:
            index = self.index_for_timestep(timestep)
            # the second of equal timesteps, but of the first timestep, which rounding may repeat, the first
            self.step_index = 0 if self.timesteps[index] == self.timesteps[0] else index
        self.check_steps_left(self.step_index)
        due = self.timesteps[self.step_index]
        on_cpu = all(not isinstance(t, Tensor) or t.device.type == "cpu" for t in (due, timestep))  # else it would sync
        is_found = self.begin_index is None and on_cpu
        if is_found and abs(check_float("timestep", timestep, high=math.inf) - float(due)) >= 1:
            hint = "pass scheduler.timesteps in order"
            raise invalid(InputError, "timestep", f"the next timestep, {due:g}", short_repr(timestep), hint)
        return self.step_index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """Return `sample` at unit variance, the UNet's input. Must be called before every step."""
        sigma = self.sigmas[self.find_step_index(timestep)]
        self.is_scale_input_called = True
        return sample / (sigma**2 + 1) ** 0.5

    def check_input_was_scaled(self) -> None:
        """Warn if `scale_model_input` was never called."""
        if not self.is_scale_input_called:
            warn_user("step: scale_model_input was not called, so the model's input may have had the wrong scale")

    @validated(check_noise_inputs)
    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_0 + sigma noise, both (b, ...), at `timesteps`, (b,), each one of `self.timesteps`.

        After `set_begin_index` the noise level is that of the current step instead, as in image-to-image.
        """
        return original_samples + noise * self.noise_levels(original_samples, timesteps)

    def noise_levels(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noise level for each sample of x in `add_noise`, in x's dtype, shaped to broadcast against x."""
        timesteps = torch.as_tensor(timesteps).flatten()
        if self.begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps]
        else:
            indices = [self.begin_index if self.step_index is None else self.step_index] * len(timesteps)
        return self.sigmas.to(x.device, x.dtype)[indices].view(-1, *[1] * (x.ndim - 1))  # b -> b 1 1 1
