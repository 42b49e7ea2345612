"""DDIM: denoising diffusion implicit models, arXiv:2010.02502."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import as_device, check_float, validated
from ..config import one_of
from ..noise import Generators
from ..outputs import DenoisedOutput
from .common import SchedulerConfig, StridedScheduler, check_noise_inputs, check_step_inputs, given_noise, to_eps, to_x0
from .thresholding import check_limits, limit_denoised
from .timesteps import integer_timesteps


def ddim_step(x0: Tensor, eps: Tensor, alpha_prev: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
    """Return x_(t-1) from the x_0 and noise predicted at x_t: equation 12 without its random term."""
    return alpha_prev**0.5 * x0 + (1 - alpha_prev - sigma**2) ** 0.5 * eps


def ddim_sigma(alpha: Tensor, alpha_prev: Tensor, eta: float) -> Tensor:
    """Return the standard deviation of the random term, equation 16: 0 at eta 0, DDPM's at eta 1."""
    return eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)) ** 0.5


@dataclass(frozen=True, eq=False, repr=False)
class DDIMConfig(SchedulerConfig):
    """Config of `DDIMScheduler`: fields, order and defaults of `scheduler_config.json`."""

    clip_sample: bool = one_of(True, False)  # clamp the predicted x_0 to plus and minus clip_sample_range
    set_alpha_to_one: bool = one_of(True, False)  # alpha after the last step is 1; else that of timestep 0
    steps_offset: int = 0  # added to the timesteps of leading spacing
    prediction_type: str = one_of("epsilon", "sample", "v_prediction")
    thresholding: bool = one_of(False, True)  # dynamic thresholding instead of clip_sample
    dynamic_thresholding_ratio: float = 0.995  # 0 to 1
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: str = one_of("leading", "trailing", "linspace")
    rescale_betas_zero_snr: bool = one_of(False, True)

    def check(self) -> None:
        super().check()
        check_limits(self)


class DDIMScheduler(StridedScheduler, part="scheduler"):
    """DDIM, arXiv:2010.02502: deterministic at eta 0, ancestral sampling as in DDPM at eta 1.

    A step depends on its timestep alone, not on earlier steps. Takes the fields of `DDIMConfig`.
    """

    config_class = DDIMConfig

    def make_tables(self) -> None:
        super().make_tables()
        self.timesteps = torch.arange(len(self), device="cpu").flip(0)
        self.check_some_noise_and_signal()

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set `timesteps` to 1 to `num_train_timesteps` sampling timesteps: (n,) int64 on `device`.

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
        """Step from `sample` at `timestep` one stride down; return the sample and the predicted x_0, all (b, c, h, w).

        `eta`, 0 to 1, scales the added noise, which is `variance_noise` or drawn from `generator` in `model_output`'s
        dtype. `use_clipped_model_output` recomputes the predicted noise from the clipped x_0. Raises `InputError`
        before `set_timesteps` and for arguments out of range.
        """
        config, t = self.config, self.timestep_index(timestep)
        alpha, alpha_prev = self.alpha(t), self.alpha(t - self.stride)
        sigma = ddim_sigma(alpha, alpha_prev, eta) if check_float("eta", eta) else 0.0
        self.check_signal(t)
        x0 = limit_denoised(config, to_x0(config.prediction_type, model_output, sample, alpha))
        eps = to_eps(config.prediction_type, model_output, sample, alpha)
        if use_clipped_model_output:
            eps = to_eps("sample", x0, sample, alpha)

        prev = ddim_step(x0, eps, alpha_prev, sigma)
        if eta > 0:
            prev = prev + sigma * given_noise(variance_noise, generator, model_output)
        return DenoisedOutput(prev, x0) if return_dict else (prev, x0)

    @validated(check_noise_inputs)
    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return v, the target of `v_prediction`, for x_0 and noise, both (b, ...), at `timesteps`, (b,) or ()."""
        signal, sigma = self.signal_and_noise(sample, timesteps)
        return signal * noise - sigma * sample
