"""Ancestral sampling with Euler's method, from Katherine Crowson's k-diffusion, after arXiv:2006.11239."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import validated
from ..config import one_of
from ..noise import Generators, randn
from ..outputs import DenoisedOutput
from .common import SchedulerConfig, check_step_inputs
from .euler import euler_step
from .sigma_space import SigmaSpaceScheduler, to_denoised


def ancestral_sigmas(sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """Return the noise level to which a step goes down, and that of the fresh noise by which it comes up again.

    Their squares add up to that of `sigma_next`; the second is the standard deviation of DDPM's posterior.
    """
    up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
    return (sigma_next**2 - up**2).clamp(min=0) ** 0.5, up  # rounding may give less than 0


@dataclass(frozen=True, eq=False, repr=False)
class EulerAncestralDiscreteConfig(SchedulerConfig):
    """Config of `EulerAncestralDiscreteScheduler`: fields, order and defaults of `scheduler_config.json`."""

    prediction_type: str = one_of("epsilon", "v_prediction")
    timestep_spacing: str = one_of("linspace", "leading", "trailing")
    steps_offset: int = 0  # added to the timesteps of leading spacing
    rescale_betas_zero_snr: bool = one_of(False, True)


class EulerAncestralDiscreteScheduler(SigmaSpaceScheduler, part="scheduler"):
    """Ancestral sampling: each step goes below the next noise level by Euler's method, then adds fresh noise.

    Takes the fields of `EulerAncestralDiscreteConfig`. Attributes: those of `SigmaSpaceScheduler`.
    """

    config_class = EulerAncestralDiscreteConfig

    def make_tables(self) -> None:
        super().make_tables()
        self.timesteps = self.timesteps.double()  # as in diffusers, before the first run

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set `timesteps` to 1 to `num_train_timesteps` sampling timesteps and `sigmas` to theirs, and reset the run.

        `timesteps`: (n,) float32 on `device`, fractional if the spacing is. Raises `InputTypeError` or `InputError` for
        any other number.
        """
        timesteps, sigmas = self.space_levels(num_inference_steps)
        self.start_run(timesteps, sigmas, device=device)

    @validated(check_step_inputs)
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:
        """Step from `sample` to the next noise level; return the sample and the predicted x_0, all (b, c, h, w).

        The fresh noise is drawn from `generator` in `model_output`'s dtype; the step is computed in float32. Raises
        `InputError` for a timestep that is not in `timesteps`, or after the last. Warns if `scale_model_input` was
        never called.
        """
        self.check_input_was_scaled()
        i, x = self.find_step_index(timestep), sample.float()
        x0 = to_denoised(self.config.prediction_type, model_output, x, self.sigmas[i])
        down, up = ancestral_sigmas(self.sigmas[i], self.sigmas[i + 1])
        noise = randn(model_output.shape, generator, dtype=model_output.dtype, device=model_output.device)
        prev = (euler_step(x, x0, self.sigmas[i], down) + noise * up).to(model_output.dtype)
        self.step_index = i + 1
        return DenoisedOutput(prev, x0) if return_dict else (prev, x0)
