"""LMS: linear multistep method on dx/dsigma, from Katherine Crowson's k-diffusion, after arXiv:2206.00364."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import as_device, check_float, check_int, validated
from ..config import one_of
from ..errors import InputError, invalid, short_repr, warn_user
from ..outputs import DenoisedOutput
from .common import Scheduler, SchedulerConfig, check_noise_inputs, check_step_inputs
from .timesteps import beta_sigmas, exponential_sigmas, karras_sigmas, space_timesteps, to_timesteps


def to_denoised(kind: str, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """Convert a model output at x = x_0 + sigma noise to the predicted x_0."""
    if kind == "epsilon":
        return x - sigma * output
    if kind == "v_prediction":
        return output * (-sigma / (sigma**2 + 1) ** 0.5) + x / (sigma**2 + 1)
    return output


# 21-point Gauss-Kronrod quadrature on [-1, 1]: the nodes from 0 up, largest first, with their weights
KRONROD = np.array(
    [
        [0.995657163025808081, 0.011694638867371874],
        [0.973906528517171720, 0.032558162307964727],
        [0.930157491355708226, 0.054755896574351996],
        [0.865063366688984511, 0.075039674810919953],
        [0.780817726586416897, 0.093125454583697606],
        [0.679409568299024406, 0.109387158802297642],
        [0.562757134668604683, 0.123491976262065851],
        [0.433395394129247191, 0.134709217311473326],
        [0.294392862701460198, 0.142775938577060081],
        [0.148874338981631211, 0.147739104901338491],
        [0, 0.149445554002916906],
    ]
)


def lms_weights(past: np.ndarray, to: float) -> list[float]:
    """Return the coefficients, in a step from past[0] to `to`, of the slopes at the float32 noise levels `past`.

    The Lagrange polynomial through the slopes is integrated over the step. Two nodes would be exact, but where one step
    spans most of the noise, the rounding of the coefficients determines the digits that remain. So quadrature and
    precision are those of diffusers: 21 nodes, polynomials in float32.
    """
    nodes, weights = np.concatenate([KRONROD, KRONROD[:-1] * (-1, 1)]).T.copy()
    middle, half = (past[0].item() + to) / 2, (to - past[0].item()) / 2
    tau = (middle + half * nodes).astype(np.float32)
    return [half * float(weights @ lagrange(tau, past, j)) for j in range(len(past))]


def lagrange(tau: np.ndarray, past: np.ndarray, j: int) -> np.ndarray:
    """Evaluate at each tau the Lagrange basis polynomial that is 1 at past[j] and 0 at the other levels."""
    others = np.delete(past, j)
    return np.prod((tau[:, None] - others) / (past[j] - others), axis=1)


SIGMA_SPACINGS = {
    "use_karras_sigmas": karras_sigmas,
    "use_exponential_sigmas": exponential_sigmas,
    "use_beta_sigmas": beta_sigmas,
}


@dataclass(frozen=True, eq=False, repr=False)
class LMSDiscreteConfig(SchedulerConfig):
    """Config of `LMSDiscreteScheduler`: fields, order and defaults of `scheduler_config.json`."""

    use_karras_sigmas: bool = one_of(False, True)
    use_exponential_sigmas: bool = one_of(False, True)
    use_beta_sigmas: bool = one_of(False, True)
    prediction_type: str = one_of("epsilon", "sample", "v_prediction")
    timestep_spacing: str = one_of("linspace", "leading", "trailing")
    steps_offset: int = 0  # added to the timesteps of leading spacing

    def check(self) -> None:
        super().check()
        if (n := sum(getattr(self, name) for name in SIGMA_SPACINGS)) > 1:
            names = ", ".join(SIGMA_SPACINGS)
            raise invalid(InputError, names, "at most one to be True", str(n), key="use_karras_sigmas")


class LMSDiscreteScheduler(Scheduler, part="scheduler"):
    """LMS: linear multistep method on the slopes dx/dsigma of x = x_0 + sigma noise, of order 4 by default.

    Takes the fields of `LMSDiscreteConfig`. Attributes: `sigmas`, (n + 1,) float32, the noise level of each timestep
    and 0 at the end; `derivatives`, the last slopes; `step_index`, the index of the next step, None before the first;
    `begin_index`, the index of the first step, None to find it by its timestep.
    """

    config_class = LMSDiscreteConfig

    def make_tables(self) -> None:
        super().make_tables()
        self.train_sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().numpy()
        self.is_scale_input_called = False
        self.set_timesteps(len(self))

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set `timesteps` to 1 to `num_train_timesteps` sampling timesteps and `sigmas` to theirs, and reset the run.

        `timesteps`: (n,) float32 on `device`, fractional if the spacing is. `sigmas` stays on the CPU. Raises
        `InputTypeError` or `InputError` for any other number.
        """
        config, timesteps = self.config, space_timesteps(self.config, num_inference_steps).astype(np.float32)
        sigmas = np.interp(timesteps, np.arange(len(self)), self.train_sigmas)
        usable = bool((np.isfinite(sigmas) & (sigmas > 0)).all())
        expected = f"betas that give {type(self).__name__} finite noise levels above 0"
        self.check_betas(usable, expected, f"noise levels from {sigmas.min():g} to {sigmas.max():g}")
        if respace := next((space for name, space in SIGMA_SPACINGS.items() if config[name]), None):
            high, low = sigmas[0], sigmas[-1]
            if respace is not karras_sigmas:  # from an Euler scheduler's config, used where diffusers uses them
                high, low = (
                    check_float(name, config.get(name) or level, low=1e-9, high=1e9)
                    for name, level in (("sigma_max", high), ("sigma_min", low))
                )
            sigmas = respace(high, low, len(timesteps))
            timesteps = to_timesteps(sigmas, self.train_sigmas)
        self.num_inference_steps = len(timesteps)
        self.sigmas = torch.from_numpy(np.append(sigmas, 0).astype(np.float32))
        self.timesteps = torch.from_numpy(timesteps.astype(np.float32)).to(as_device("device", device))
        self.step_index: int | None = None
        self.begin_index: int | None = None
        self.derivatives: Sequence[Tensor] = []

    @property
    def init_noise_sigma(self) -> Tensor:
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
        if self.step_index is None:
            self.step_index = self.index_for_timestep(timestep) if self.begin_index is None else self.begin_index
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

    def slope_weights(self, index: int, order: int) -> list[float]:
        """Return the coefficients of the last `order` slopes in the step of this index, the newest first."""
        past = self.sigmas[index - order + 1 : index + 1].flip(0)
        return lms_weights(past.numpy(), float(self.sigmas[index + 1]))

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        """Return the coefficient of the slope `current_order` steps back, of `order` slopes, in step `t`."""
        weights = self.slope_weights(t, check_int("order", order, high=t + 1))
        return weights[check_int("current_order", current_order, low=0, high=order - 1)]

    @validated(check_step_inputs)
    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, order: int = 4, return_dict: bool = True
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:
        """Step from `sample` to the next noise level; return the sample and the predicted x_0, all (b, c, h, w).

        `order`: how many of the last slopes are used, 1 or more. Raises `InputError` for a timestep that is not in
        `timesteps`, or after the last. Warns if `scale_model_input` was never called.
        """
        if not self.is_scale_input_called:
            warn_user("step: scale_model_input was not called, so the model's input may have had the wrong scale")
        order, i = check_int("order", order), self.find_step_index(timestep)
        sigma = self.sigmas[i]
        x0 = to_denoised(self.config.prediction_type, model_output, sample, sigma)
        self.derivatives = [*self.derivatives, (sample - x0) / sigma][-max(order, len(self.derivatives)) :]
        # a run that starts at a later index has fewer slopes than coefficients; diffusers drops the rest, too
        weighted = zip(self.slope_weights(i, min(i + 1, order)), reversed(self.derivatives), strict=False)
        prev = sample + sum(weight * slope for weight, slope in weighted)
        self.step_index = i + 1
        return DenoisedOutput(prev, x0) if return_dict else (prev, x0)

    @validated(check_noise_inputs)
    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_0 + sigma noise, both (b, ...), at `timesteps`, (b,), each one of `self.timesteps`.

        After `set_begin_index` the noise level is that of the current step instead, as in image-to-image.
        """
        timesteps = torch.as_tensor(timesteps).flatten()
        if self.begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps]
        else:
            indices = [self.begin_index if self.step_index is None else self.step_index] * len(timesteps)
        sigma = self.sigmas.to(original_samples.device, original_samples.dtype)[indices]
        return original_samples + noise * sigma.view(-1, *[1] * (original_samples.ndim - 1))
