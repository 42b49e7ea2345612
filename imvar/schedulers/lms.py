"""LMS: linear multistep steps along dx/dsigma, after Katherine Crowson's k-diffusion and arXiv:2206.00364."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import one_of
from ..errors import InputError
from ..outputs import DenoisedOutput
from .common import Scheduler, SchedulerConfig, count, space_timesteps
from .sigmas import beta, exponential, karras, to_timesteps


def to_x0(kind: str, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The clean sample that a network's output implies at x = x_0 + sigma noise."""
    if kind == "epsilon":
        return x - sigma * output
    if kind == "v_prediction":
        return output * (-sigma / (sigma**2 + 1) ** 0.5) + x / (sigma**2 + 1)
    return output


def lms_weights(past: np.ndarray, to: float) -> list[float]:
    """How much each slope counts in a step from past[0] to `to`, for slopes known at the levels `past`.

    The polynomial through the slopes, in Lagrange's form, is integrated exactly by Gauss and Legendre's rule.
    """
    nodes, weights = np.polynomial.legendre.leggauss((len(past) + 1) // 2)
    half = (to - past[0]) / 2
    tau = past[0] + half * (1 + nodes)
    return [float(half * (weights * basis(tau, past, j)).sum()) for j in range(len(past))]


def basis(tau: np.ndarray, past: np.ndarray, j: int) -> np.ndarray:
    """The polynomial that is 1 at past[j] and 0 at the others."""
    others = np.delete(past, j)
    return np.prod((tau[:, None] - others) / (past[j] - others), axis=1)


@dataclass(frozen=True, eq=False)
class LMSDiscreteConfig(SchedulerConfig):
    """The settings of `LMSDiscreteScheduler`: fields, order and defaults of `scheduler_config.json`."""

    use_karras_sigmas: bool = one_of(False, True)
    use_exponential_sigmas: bool = one_of(False, True)
    use_beta_sigmas: bool = one_of(False, True)
    prediction_type: str = one_of("epsilon", "sample", "v_prediction")
    timestep_spacing: str = one_of("linspace", "leading", "trailing")
    steps_offset: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_karras_sigmas + self.use_exponential_sigmas + self.use_beta_sigmas > 1:
            raise InputError("use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: at most one can be True")


class LMSDiscreteScheduler(Scheduler):
    """A walk along x = x_0 + sigma noise that remembers the last slopes.

    Attributes: `sigmas`, (n + 1,) float32, the noise level of each timestep and 0 at the end; `derivatives`, the
    last slopes; `step_index`, where the walk stands, None before it starts; `begin_index`, where it is to start.
    """

    config_class = LMSDiscreteConfig

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.table = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().numpy()  # sigma of every timestep
        self.is_scale_input_called = False
        self.set_timesteps(len(self))

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps to visit, 1 to `num_train_timesteps` of them, and forget the history.

        `timesteps`: (n,) float32 on `device`, fractional where the spacing is. `sigmas` stays on the CPU. Raises
        `InputTypeError` or `InputError` for any other number.
        """
        config, n = self.config, count("num_inference_steps", num_inference_steps, high=len(self))
        timesteps = space_timesteps(config, n).astype(np.float32)
        sigmas = np.interp(timesteps, np.arange(len(self)), self.table)
        if not (np.isfinite(sigmas) & (sigmas > 0)).all():
            raise InputError(f"{type(self).__name__}: these betas give noise levels from {sigmas.min():g} to "
                             f"{sigmas.max():g}; levels above 0 and finite would do")
        high, low = sigmas[0], sigmas[-1]
        if config.use_karras_sigmas:
            sigmas = karras(high, low, n)
        elif config.use_exponential_sigmas or config.use_beta_sigmas:
            high, low = config.get("sigma_max") or high, config.get("sigma_min") or low  # of an Euler scheduler's
            sigmas = (beta if config.use_beta_sigmas else exponential)(high, low, n)
        if config.use_karras_sigmas or config.use_exponential_sigmas or config.use_beta_sigmas:
            timesteps = to_timesteps(sigmas, self.table)
        self.num_inference_steps = n
        self.sigmas = torch.from_numpy(np.append(sigmas, 0).astype(np.float32))
        self.timesteps = torch.from_numpy(timesteps.astype(np.float32)).to(device)
        self.step_index: int | None = None
        self.begin_index: int | None = None
        self.derivatives: Sequence[Tensor] = []

    @property
    def init_noise_sigma(self) -> Tensor:
        """The deviation of the noise to start from, 0-d."""
        highest = self.sigmas.max()
        return (highest**2 + 1) ** 0.5 if self.config.timestep_spacing == "leading" else highest

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the next walk at this entry of `timesteps` instead of finding it by value."""
        self.begin_index = count("begin_index", begin_index, low=0, high=len(self.timesteps) - 1)

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Where a timestep stands in `timesteps`, or in another schedule; of several places, the second."""
        timesteps = self.timesteps if schedule_timesteps is None else schedule_timesteps
        if isinstance(timestep, Tensor):
            timestep = timestep.to(timesteps.device)
        places = (timesteps == timestep).nonzero().flatten().tolist()
        if not places:
            raise InputError(f"timestep={timestep}: one of scheduler.timesteps would do, from "
                             f"{timesteps[0]:g} down to {timesteps[-1]:g}")
        return places[:2][-1]

    def sigma_at(self, timestep: float | Tensor) -> Tensor:
        """The noise level where the walk stands, 0-d; the first timestep says where it starts."""
        if self.step_index is None:
            self.step_index = self.index_for_timestep(timestep) if self.begin_index is None else self.begin_index
        if self.step_index >= len(self.timesteps):
            raise InputError(f"step: all {len(self.timesteps)} steps are done; call set_timesteps for another run")
        return self.sigmas[self.step_index]

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """What the network is shown of `sample`: the same at unit variance. To be called before every step."""
        sigma = self.sigma_at(timestep)
        self.is_scale_input_called = True
        return sample / (sigma**2 + 1) ** 0.5

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        """The weight of the slope `current_order` steps back, of `order` slopes, in step number `t`."""
        past = self.sigmas[t - order + 1 : t + 1].flip(0).double().numpy()
        return lms_weights(past, float(self.sigmas[t + 1]))[current_order]

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, order: int = 4,
             return_dict: bool = True) -> DenoisedOutput | tuple[Tensor, Tensor]:
        """From `sample` to the next noise level, both (b, c, h, w), with the x_0 predicted on the way.

        `order`: how many of the last slopes count, 1 or more. Raises `InputError` for a timestep that is not in
        `timesteps`, or when all are done. Warns where `scale_model_input` was never called.
        """
        if not self.is_scale_input_called:
            warnings.warn("step: scale_model_input was not called, so the network may have seen a wrong scale",
                          stacklevel=2)
        sigma, keep = self.sigma_at(timestep), count("order", order)
        i = self.step_index or 0
        x0 = to_x0(self.config.prediction_type, model_output, sample, sigma)
        self.derivatives = [*self.derivatives, (sample - x0) / sigma][-max(keep, len(self.derivatives)) :]

        order = min(i + 1, keep)
        past = self.sigmas[i - order + 1 : i + 1].flip(0).double().numpy()
        weights = lms_weights(past, float(self.sigmas[i + 1]))
        # a walk that began at a later index has fewer slopes than weights; the reference lets the rest go, too
        prev = sample + sum(w * slope for w, slope in zip(weights, reversed(self.derivatives), strict=False))
        self.step_index = i + 1
        return DenoisedOutput(prev, x0) if return_dict else (prev, x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_0 + sigma noise, both (b, ...), at `timesteps`, (b,), each one of `self.timesteps`.

        Once `set_begin_index` was called the walk's own place counts instead, as in image-to-image.
        """
        places = [self.step_index if self.step_index is not None else self.begin_index] * len(timesteps)
        if self.begin_index is None:
            places = [self.index_for_timestep(t) for t in timesteps]
        sigma = self.sigmas.to(original_samples.device, original_samples.dtype)[places]
        return original_samples + noise * sigma.view(-1, *[1] * (original_samples.ndim - 1))
