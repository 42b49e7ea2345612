"""DDIM: denoising diffusion implicit models, arXiv:2010.02502."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import as_device, check_float, validated
from ..config import one_of
from ..errors import InputError
from ..noise import Generators, randn
from ..outputs import DenoisedOutput
from .common import SchedulerConfig, VariancePreserving, check_noise_inputs, check_step_inputs, to_eps, to_x0
from .timesteps import integer_timesteps, make_betas, zero_terminal_snr


def ddim_step(x0: Tensor, eps: Tensor, alpha_prev: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
    """x_(t-1) from the predicted x_0 and noise of x_t: equation 12 without its random term."""
    return alpha_prev**0.5 * x0 + (1 - alpha_prev - sigma**2) ** 0.5 * eps


def ddim_sigma(alpha: Tensor, alpha_prev: Tensor, eta: float) -> Tensor:
    """How much noise to put back, equation 16: none at eta 0, DDPM's at eta 1."""
    return eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)) ** 0.5


def dynamic_threshold(x0: Tensor, ratio: float, limit: float) -> Tensor:
    """x_0 clipped to the given quantile of its own size, from 1 to `limit`, and divided by it.

    Section 2.3 of arXiv:2205.11487, for each sample of the batch.
    """
    x = x0 if x0.dtype == torch.float64 else x0.float()  # quantile knows no half precision
    bound = x.flatten(1).abs().quantile(ratio, dim=1).clamp(1, limit)
    bound = bound.view(-1, *[1] * (x.ndim - 1))  # b -> b 1 1 1
    return (x.clamp(-bound, bound) / bound).to(x0.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class DDIMConfig(SchedulerConfig):
    """The settings of `DDIMScheduler`: fields, order and defaults of `scheduler_config.json`."""

    clip_sample: bool = one_of(True, False)  # the predicted x_0, to plus and minus clip_sample_range
    set_alpha_to_one: bool = one_of(True, False)  # where the walk ends; else at timestep 0's alpha
    steps_offset: int = 0  # added to the timesteps of leading spacing
    prediction_type: str = one_of("epsilon", "sample", "v_prediction")
    thresholding: bool = one_of(False, True)  # dynamic_threshold in place of clip_sample
    dynamic_thresholding_ratio: float = 0.995  # 0 to 1
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: str = one_of("leading", "trailing", "linspace")
    rescale_betas_zero_snr: bool = one_of(False, True)

    def check(self) -> None:
        super().check()
        check_float("dynamic_thresholding_ratio", self.dynamic_thresholding_ratio)
        check_float("clip_sample_range", self.clip_sample_range, high=math.inf)
        check_float("sample_max_value", self.sample_max_value, high=math.inf)


class DDIMScheduler(VariancePreserving, part="scheduler"):
    """DDIM, arXiv:2010.02502: deterministic steps at eta 0, DDPM's at eta 1.

    Each step stands alone: it knows its timestep and no history. Takes the settings of `DDIMConfig`.
    """

    config_class = DDIMConfig

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.timesteps = torch.arange(len(self)).flip(0)
        if self.alphas_cumprod[-1] == 1 or self.alphas_cumprod[0] == 0:
            raise InputError(
                "beta_start, beta_end, trained_betas: with these there is no noise, or no signal, at any "
                "timestep; numbers between 0 and 1 would do",
                key="beta_start",
            )

    def make_betas(self) -> Tensor:
        betas = make_betas(self.config)
        return zero_terminal_snr(betas) if self.config.rescale_betas_zero_snr else betas

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps to visit, 1 to `num_train_timesteps` of them: (n,) int64 on `device`.

        Raises `InputTypeError` or `InputError` for any other number.
        """
        timesteps = integer_timesteps(self.config, num_inference_steps)
        self.timesteps = torch.from_numpy(timesteps).to(as_device("device", device))
        self.num_inference_steps = len(timesteps)

    @validated(check_step_inputs)
    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:
        """From `sample` at `timestep` one stride down, both (b, c, h, w), with the x_0 predicted on the way.

        `eta`, 0 to 1, scales the fresh noise, which is `variance_noise` or drawn from `generator` in
        `model_output`'s dtype. `use_clipped_model_output` takes the noise prediction anew from the clipped x_0.
        Raises `InputError` before `set_timesteps` and for arguments out of range.
        """
        config, t = self.config, self.timestep_index(timestep)
        alpha, alpha_prev = self.alpha(t), self.alpha(t - self.stride)
        sigma = ddim_sigma(alpha, alpha_prev, eta) if check_float("eta", eta) else 0.0
        bounded = config.thresholding or config.clip_sample
        if alpha == 0 and config.prediction_type == "epsilon" and not bounded:
            raise InputError(
                f"timestep={t}: no signal is left here for prediction_type='epsilon' to divide by; "
                "'v_prediction', or timestep_spacing='leading', would do"
            )

        x0 = to_x0(config.prediction_type, model_output, sample, alpha)
        eps = to_eps(config.prediction_type, model_output, sample, alpha)
        if config.thresholding:
            x0 = dynamic_threshold(x0, config.dynamic_thresholding_ratio, config.sample_max_value)
        elif config.clip_sample:
            x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
        if use_clipped_model_output:
            eps = to_eps("sample", x0, sample, alpha)

        prev = ddim_step(x0, eps, alpha_prev, sigma)
        if eta > 0:
            prev = prev + sigma * self.draw_noise(model_output, generator, variance_noise)
        return DenoisedOutput(prev, x0) if return_dict else (prev, x0)

    @staticmethod
    def draw_noise(like: Tensor, generator: Generators | None, given: Tensor | None) -> Tensor:
        if given is None:
            return randn(like.shape, generator, dtype=like.dtype, device=like.device)
        if generator is not None:
            raise InputError("variance_noise and generator both came; one of them would do")
        return given

    @validated(check_noise_inputs)
    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The v that a network of `v_prediction` learns, from x_0 and noise, (b, ...), at `timesteps`, (b,) or ()."""
        signal, sigma = self.signal_and_noise(sample, timesteps)
        return signal * noise - sigma * sample
