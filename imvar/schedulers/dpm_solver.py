"""DPM-Solver++(2M): exponential integrator of the ODE of diffusion, arXiv:2211.01095, and its SDE variant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_float, validated
from ..config import fixed, one_of
from ..errors import InputError, invalid
from ..noise import Generators
from ..outputs import SchedulerOutput
from .common import SchedulerConfig, check_noise_inputs, check_step_inputs, given_noise
from .sigma_space import SigmaSpaceScheduler, check_no_spacing, check_spacing
from .thresholding import dynamic_threshold
from .timesteps import check_one_schedule, descending, integer_timesteps

# The paper's notation: x_t = alpha x_0 + sigma noise with alpha^2 + sigma^2 = 1, and lambda = log(alpha / sigma)


def signal_and_sigma(level: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma at a noise level, the ratio sigma / alpha."""
    alpha = 1 / (level**2 + 1) ** 0.5
    return alpha, level * alpha


def log_snr(level: Tensor) -> Tensor:
    """Return lambda, half the logarithm of the signal-to-noise ratio, at a noise level."""
    alpha, sigma = signal_and_sigma(level)
    return alpha.log() - sigma.log()


def predicted_x0(kind: str, output: Tensor, x: Tensor, level: Tensor) -> Tensor:
    """Convert a model output at x = alpha x_0 + sigma noise to the predicted x_0."""
    alpha, sigma = signal_and_sigma(level)
    if kind == "epsilon":
        return (x - sigma * output) / alpha
    return alpha * x - sigma * output if kind == "v_prediction" else output


def dpm_solver_step(
    x: Tensor, x0s: Sequence[Tensor], levels: Sequence[Tensor], is_heun: bool = False, noise: Tensor | None = None
) -> Tensor:
    """Return x at the noise level levels[0], from x at levels[1].

    `x0s`: one or two predictions of x_0, at levels[1] and levels[2]: order 1, equation 4.1 of the paper, or 2, its
    algorithm 2 (`is_heun`: with the exact integral of the slope instead of the midpoint rule). With `noise` the step
    is that of the SDE, SDE-DPM-Solver++ of the paper's appendix, which decays twice as fast and adds fresh noise.
    """
    (alpha, sigma), (_, sigma_from) = map(signal_and_sigma, levels[:2])
    h = log_snr(levels[0]) - log_snr(levels[1])
    rate, ratio = (1.0, sigma / sigma_from) if noise is None else (2.0, sigma / sigma_from * (-h).exp())
    decay = (-rate * h).exp() - 1
    x_next = ratio * x - alpha * decay * x0s[0]
    if len(x0s) > 1:
        h_before = log_snr(levels[1]) - log_snr(levels[2])
        slope = 1 / (h_before / h) * (x0s[0] - x0s[1])
        x_next = x_next + alpha * (decay / (rate * h) + 1 if is_heun else -0.5 * decay) * slope
    return x_next if noise is None else x_next + sigma * (-decay) ** 0.5 * noise


@dataclass(frozen=True, eq=False, repr=False)
class DPMSolverMultistepConfig(SchedulerConfig):
    """Config of `DPMSolverMultistepScheduler`: fields, order and defaults of `scheduler_config.json`."""

    solver_order: int = one_of(2, 1)
    prediction_type: str = one_of("epsilon", "sample", "v_prediction")
    thresholding: bool = one_of(False, True)  # dynamic thresholding of the predicted x_0
    dynamic_thresholding_ratio: float = 0.995  # 0 to 1
    sample_max_value: float = 1.0
    algorithm_type: str = one_of("dpmsolver++", "sde-dpmsolver++", "deis")
    solver_type: str = one_of("midpoint", "heun", "logrho", "bh1", "bh2")
    lower_order_final: bool = one_of(True, False)  # in runs of less than 15 steps the last is of order 1
    euler_at_final: bool = one_of(False, True)  # in runs of any length
    use_karras_sigmas: bool | None = one_of(False, True, None)
    use_exponential_sigmas: bool | None = one_of(False, True, None)
    use_beta_sigmas: bool | None = one_of(False, True, None)
    use_lu_lambdas: bool | None = fixed(False)
    use_flow_sigmas: bool | None = fixed(False)
    flow_shift: float | None = 1.0  # of flow sigmas alone
    final_sigmas_type: str = one_of("zero", "sigma_min")  # after the last step: 0, or the lowest of training
    lambda_min_clipped: float = fixed(-math.inf)
    variance_type: str | None = one_of(None, "fixed_small", "fixed_small_log", "fixed_large")  # of DDPM alone
    timestep_spacing: str = one_of("linspace", "leading", "trailing")
    steps_offset: int = 0  # added to the timesteps of leading spacing
    rescale_betas_zero_snr: bool = one_of(False, True)
    use_dynamic_shifting: bool = fixed(False)
    time_shift_type: str = "exponential"  # of dynamic shifting alone

    def check(self) -> None:
        super().check()
        check_spacing(self)
        check_float("dynamic_thresholding_ratio", self.dynamic_thresholding_ratio)
        check_float("sample_max_value", self.sample_max_value, high=math.inf)
        if self.algorithm_type == "deis":  # names of other multistep schedulers, in whose place diffusers uses these
            object.__setattr__(self, "algorithm_type", "dpmsolver++")
        if self.solver_type not in ("midpoint", "heun"):
            object.__setattr__(self, "solver_type", "midpoint")


class DPMSolverMultistepScheduler(SigmaSpaceScheduler, part="scheduler"):
    """DPM-Solver++(2M), arXiv:2211.01095: a multistep method on the last two predictions of x_0.

    Takes the fields of `DPMSolverMultistepConfig`. Attributes: those of `SigmaSpaceScheduler`; `model_outputs`, the
    last predictions of x_0, at most `solver_order`. Before the first run diffusers has `sigmas` in the opposite order.
    """

    config_class = DPMSolverMultistepConfig
    model_outputs: Sequence[Tensor] = ()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Set `timesteps`, (n,) int64 on `device`, and `sigmas`, (n + 1,), and reset the run.

        Either `num_inference_steps`, 1 to `num_train_timesteps` (one less with leading spacing), or `timesteps`, n
        descending integers. `mu` is of dynamic shifting, which is not supported. Raises `InputTypeError` or
        `InputError` for anything else.
        """
        check_one_schedule(num_inference_steps=num_inference_steps, timesteps=timesteps)
        if mu is not None:
            raise invalid(InputError, "mu", "None", str(mu), "dynamic shifting is for flow matching")
        if timesteps is not None:
            check_no_spacing(self.config, "timesteps")
            times = descending("timesteps", timesteps, len(self) - 1).astype(np.int64)
        else:
            times = integer_timesteps(self.config, num_inference_steps, skipped=1)  # type: ignore[arg-type]
        times, levels = self.respace(times, self.sigmas_at(times))
        if self.config.use_karras_sigmas and self.config.beta_schedule != "squaredcos_cap_v2":
            times = times.round()  # the others are truncated
        self.start_run(times.astype(np.int64), levels, self.last_sigma, device)
        self.model_outputs = []

    def sigma_range(self, spacing: Any, sigmas: np.ndarray) -> tuple[float, float]:
        return super().sigma_range(spacing, self.train_sigmas[::-1])

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the initial noise: 1, as x keeps its variance."""
        return 1.0

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return `sample`: the UNet's input is not scaled."""
        return sample

    def order_at(self, index: int) -> int:
        """Return the order of the step of this index: 1 for the first and mostly for the last, else `solver_order`.

        It is also 1 where a noise level repeats, as at 1,000 steps, since there is no slope between equal levels.
        """
        config, steps = self.config, len(self.timesteps)
        is_stabilized = config.euler_at_final or (config.lower_order_final and steps < 15)
        is_first_order = index == steps - 1 and (is_stabilized or config.final_sigmas_type == "zero")
        levels = self.sigmas[max(index - 1, 0) : index + 2]
        return 1 if is_first_order or (levels.diff() == 0).any() else min(config.solver_order, len(self.model_outputs))

    @validated(check_step_inputs)
    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Step from `sample` to the next noise level, both (b, c, h, w).

        The noise of the SDE is `variance_noise` or drawn from `generator` in float32, in which the step is computed.
        Raises `InputError` for a timestep that is not in `timesteps`, or after the last.
        """
        config, i = self.config, self.find_step_index(timestep)
        x0 = predicted_x0(config.prediction_type, model_output, sample, self.sigmas[i])
        if config.thresholding:
            x0 = dynamic_threshold(x0, config.dynamic_thresholding_ratio, config.sample_max_value)
        self.model_outputs = [x0, *self.model_outputs][: config.solver_order]
        noise = None
        if config.algorithm_type == "sde-dpmsolver++":
            noise = given_noise(variance_noise, generator, x0.float())
        order = self.order_at(i)
        levels = [self.sigmas[k] for k in (i + 1, i, i - 1)[: order + 1]]
        is_heun = config.solver_type == "heun"
        prev = dpm_solver_step(sample.float(), self.model_outputs[:order], levels, is_heun, noise).to(x0.dtype)
        self.step_index = i + 1
        return SchedulerOutput(prev) if return_dict else (prev,)

    @validated(check_noise_inputs)
    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return alpha x_0 + sigma noise, both (b, ...), at `timesteps`, (b,), each one of `self.timesteps`.

        After `set_begin_index` the noise level is that of the current step instead, as in image-to-image.
        """
        alpha, sigma = signal_and_sigma(self.noise_levels(original_samples, timesteps))
        return alpha * original_samples + sigma * noise
