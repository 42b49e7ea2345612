"""DDPM: ancestral sampling of denoising diffusion probabilistic models, arXiv:2006.11239."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import as_device, validated
from ..config import one_of
from ..errors import InputError, invalid
from ..noise import Generators, randn
from ..outputs import DenoisedOutput
from .common import SchedulerConfig, VariancePreserving, check_noise_inputs, check_step_inputs, to_x0
from .thresholding import check_limits, limit_denoised
from .timesteps import check_one_schedule, descending, integer_timesteps

MIN_VARIANCE = 1e-20


def posterior_mean(x0: Tensor, x: Tensor, alpha: Tensor, alpha_prev: Tensor) -> Tensor:
    """Return the mean of x_(t-1) given x_0 and x_t: equation 7, with beta = 1 - alpha / alpha_prev."""
    step_alpha = alpha / alpha_prev
    x0_weight = alpha_prev**0.5 * (1 - step_alpha) / (1 - alpha)
    return x0_weight * x0 + step_alpha**0.5 * (1 - alpha_prev) / (1 - alpha) * x


def posterior_sigma(kind: str | None, alpha: Tensor, alpha_prev: Tensor) -> Tensor:
    """Return the standard deviation of x_(t-1), section 3.2: that of equation 7, or with "fixed_large" sqrt(beta)."""
    beta = 1 - alpha / alpha_prev
    if kind == "fixed_large":
        return beta**0.5
    variance = ((1 - alpha_prev) / (1 - alpha) * beta).clamp(min=MIN_VARIANCE)
    return (0.5 * variance.log()).exp() if kind == "fixed_small_log" else variance**0.5


@dataclass(frozen=True, eq=False, repr=False)
class DDPMConfig(SchedulerConfig):
    """Config of `DDPMScheduler`: fields, order and defaults of `scheduler_config.json`."""

    variance_type: str | None = one_of("fixed_small", "fixed_small_log", "fixed_large", None)  # None: the first
    clip_sample: bool = one_of(True, False)  # clamp the predicted x_0 to plus and minus clip_sample_range
    prediction_type: str = one_of("epsilon", "sample", "v_prediction")
    thresholding: bool = one_of(False, True)  # dynamic thresholding instead of clip_sample
    dynamic_thresholding_ratio: float = 0.995  # 0 to 1
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: str = one_of("leading", "linspace", "trailing")
    steps_offset: int = 0  # added to the timesteps of leading spacing
    rescale_betas_zero_snr: bool = one_of(False, True)

    def check(self) -> None:
        super().check()
        check_limits(self)


class DDPMScheduler(VariancePreserving, part="scheduler"):
    """DDPM, arXiv:2006.11239: each step draws x_(t-1) from the posterior given x_t and the predicted x_0.

    A step depends on its timestep and the next of `timesteps`, not on earlier steps. Takes the fields of `DDPMConfig`.
    """

    config_class = DDPMConfig

    def make_tables(self) -> None:
        super().make_tables()
        self.timesteps = torch.arange(len(self), device="cpu").flip(0)
        self.check_some_noise_and_signal()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Set `timesteps`, (n,) int64 on `device`.

        Either `num_inference_steps`, 1 to `num_train_timesteps`, or `timesteps`, n descending integers. Raises
        `InputTypeError` or `InputError` for anything else.
        """
        check_one_schedule(num_inference_steps=num_inference_steps, timesteps=timesteps)
        if timesteps is None:
            times = integer_timesteps(self.config, num_inference_steps)  # type: ignore[arg-type]
        else:
            times = descending("timesteps", timesteps, len(self) - 1).astype(np.int64)
        self.timesteps = torch.from_numpy(times).to(as_device("device", device))
        self.num_inference_steps = len(times)

    def previous_timestep(self, timestep: Any) -> int:
        """Return the entry of `timesteps` after this one, -1 after the last. Raises `InputError` if it is not in it."""
        timesteps = self.timesteps.tolist()
        t = self.timestep_index(timestep)
        if t not in timesteps:
            expected = f"one of scheduler.timesteps, from {timesteps[0]} down to {timesteps[-1]}"
            raise invalid(InputError, "timestep", expected, str(t))
        return [*timesteps, -1][timesteps.index(t) + 1]

    @validated(check_step_inputs)
    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:
        """Step from `sample` to the next timestep; return the sample and the predicted x_0, all (b, c, h, w).

        Above timestep 0, noise is drawn from `generator` in `model_output`'s dtype. Raises `InputError` for a timestep
        that is not in `timesteps`.
        """
        config, t = self.config, self.timestep_index(timestep)
        t_prev = self.previous_timestep(t)
        alpha = self.alphas_cumprod[t]
        alpha_prev = self.alphas_cumprod[t_prev] if t_prev >= 0 else torch.ones((), device="cpu")
        self.check_signal(t)
        x0 = limit_denoised(config, to_x0(config.prediction_type, model_output, sample, alpha))
        prev = posterior_mean(x0, sample, alpha, alpha_prev)
        if t > 0:
            noise = randn(model_output.shape, generator, dtype=model_output.dtype, device=model_output.device)
            prev = prev + posterior_sigma(config.variance_type, alpha, alpha_prev) * noise
        return DenoisedOutput(prev, x0) if return_dict else (prev, x0)

    @validated(check_noise_inputs)
    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return v, the target of `v_prediction`, for x_0 and noise, both (b, ...), at `timesteps`, (b,) or ()."""
        signal, sigma = self.signal_and_noise(sample, timesteps)
        return signal * noise - sigma * sample
