"""LMS: linear multistep steps along dx/dsigma, after Katherine Crowson's k-diffusion and arXiv:2206.00364."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import as_device, check_float, check_int, validated
from ..config import one_of
from ..errors import InputError, short_repr
from ..outputs import DenoisedOutput
from .common import Scheduler, SchedulerConfig, check_noise_inputs, check_step_inputs
from .timesteps import beta_sigmas, exponential_sigmas, karras_sigmas, space_timesteps, to_timesteps


def to_denoised(kind: str, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The clean sample that a network's output implies at x = x_0 + sigma noise."""
    if kind == "epsilon":
        return x - sigma * output
    if kind == "v_prediction":
        return output * (-sigma / (sigma**2 + 1) ** 0.5) + x / (sigma**2 + 1)
    return output


# The 21-point rule of Gauss and Kronrod on [-1, 1]: its nodes above 0 and their weights, then that of the node 0.
KRONROD_NODES = (
    0.995657163025808081,
    0.973906528517171720,
    0.930157491355708226,
    0.865063366688984511,
    0.780817726586416897,
    0.679409568299024406,
    0.562757134668604683,
    0.433395394129247191,
    0.294392862701460198,
    0.148874338981631211,
)
KRONROD_WEIGHTS = (
    0.011694638867371874,
    0.032558162307964727,
    0.054755896574351996,
    0.075039674810919953,
    0.093125454583697606,
    0.109387158802297642,
    0.123491976262065851,
    0.134709217311473326,
    0.142775938577060081,
    0.147739104901338491,
)
KRONROD_CENTER_WEIGHT = 0.149445554002916906


def lms_weights(past: np.ndarray, to: float) -> list[float]:
    """How much each slope counts in a step from past[0] to `to`, for slopes known at the levels `past`, float32.

    The polynomial through the slopes, in Lagrange's form, is integrated over the step. Two points would be exact,
    but where one step spans most of the noise the rounding of the weights decides the digits that are left. So we
    keep to the rule and the precision of the reference: 21 points, polynomials in float32.
    """
    nodes = np.array([*KRONROD_NODES, 0, *(-x for x in KRONROD_NODES)])
    weights = np.array([*KRONROD_WEIGHTS, KRONROD_CENTER_WEIGHT, *KRONROD_WEIGHTS])
    middle, half = (past[0].item() + to) / 2, (to - past[0].item()) / 2
    tau = (middle + half * nodes).astype(np.float32)
    return [half * float(weights @ lagrange(tau, past, j)) for j in range(len(past))]


def lagrange(tau: np.ndarray, past: np.ndarray, j: int) -> np.ndarray:
    """At each tau, the polynomial that is 1 at past[j] and 0 at the other levels."""
    others = np.delete(past, j)
    return np.prod((tau[:, None] - others) / (past[j] - others), axis=1)


@dataclass(frozen=True, eq=False, repr=False)
class LMSDiscreteConfig(SchedulerConfig):
    """The settings of `LMSDiscreteScheduler`: fields, order and defaults of `scheduler_config.json`."""

    use_karras_sigmas: bool = one_of(False, True)
    use_exponential_sigmas: bool = one_of(False, True)
    use_beta_sigmas: bool = one_of(False, True)
    prediction_type: str = one_of("epsilon", "sample", "v_prediction")
    timestep_spacing: str = one_of("linspace", "leading", "trailing")
    steps_offset: int = 0  # added to the timesteps of leading spacing

    def check(self) -> None:
        super().check()
        if self.use_karras_sigmas + self.use_exponential_sigmas + self.use_beta_sigmas > 1:
            raise InputError(
                "use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: at most one can be True",
                key="use_karras_sigmas",
            )


class LMSDiscreteScheduler(Scheduler, part="scheduler"):
    """LMS: a walk along x = x_0 + sigma noise, each step along the last slopes dx/dsigma, four as a rule.

    Takes the settings of `LMSDiscreteConfig`. Attributes: `sigmas`, (n + 1,) float32, the noise level of each
    timestep and 0 at the end; `derivatives`, the last slopes; `step_index`, where the walk stands, None before it
    starts; `begin_index`, where it is to start.
    """

    config_class = LMSDiscreteConfig

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.table = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().numpy()  # sigma of every timestep
        self.is_scale_input_called = False
        self.set_schedule(space_timesteps(self.config, len(self)))

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps to visit, 1 to `num_train_timesteps` of them, and forget the history.

        `timesteps`: (n,) float32 on `device`, fractional where the spacing is. `sigmas` stays on the CPU. Raises
        `InputTypeError` or `InputError` for any other number.
        """
        self.set_schedule(space_timesteps(self.config, num_inference_steps), device)

    def set_schedule(self, timesteps: np.ndarray, device: torch.device | str | None = None) -> None:
        """Find the noise level of each timestep, or respace the levels and find the timestep of each; start anew."""
        config, n = self.config, len(timesteps)
        timesteps = timesteps.astype(np.float32)
        sigmas = np.interp(timesteps, np.arange(len(self)), self.table)
        if not (np.isfinite(sigmas) & (sigmas > 0)).all():
            raise InputError(
                f"{type(self).__name__}: these betas give noise levels from {sigmas.min():g} to "
                f"{sigmas.max():g}; levels above 0 and finite would do"
            )
        if respace := self.sigma_spacing():
            high, low = sigmas[0], sigmas[-1]
            if respace is not karras_sigmas:  # an Euler scheduler's settings, honoured where the reference does
                high, low = (
                    check_float(name, config.get(name) or level, low=1e-9, high=1e9)
                    for name, level in (("sigma_max", high), ("sigma_min", low))
                )
            sigmas = respace(high, low, n)
            timesteps = to_timesteps(sigmas, self.table)
        self.num_inference_steps = n
        self.sigmas = torch.from_numpy(np.append(sigmas, 0).astype(np.float32))
        self.timesteps = torch.from_numpy(timesteps.astype(np.float32)).to(as_device("device", device))
        self.step_index: int | None = None
        self.begin_index: int | None = None
        self.derivatives: Sequence[Tensor] = []

    def sigma_spacing(self) -> Callable[[float, float, int], np.ndarray] | None:
        """The function that respaces the noise levels, if the settings ask for one."""
        choices = {
            "use_karras_sigmas": karras_sigmas,
            "use_exponential_sigmas": exponential_sigmas,
            "use_beta_sigmas": beta_sigmas,
        }
        return next((space for name, space in choices.items() if self.config[name]), None)

    @property
    def init_noise_sigma(self) -> Tensor:
        """The deviation of the noise to start from, 0-d."""
        highest = self.sigmas.max()
        return (highest**2 + 1) ** 0.5 if self.config.timestep_spacing == "leading" else highest

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the next walk at this entry of `timesteps` instead of finding it by value."""
        self.begin_index = check_int("begin_index", begin_index, low=0, high=len(self.timesteps) - 1)

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Where a timestep stands in `timesteps`, or in another schedule; of several places, the second.

        Raises `InputError` for a timestep that is not in it.
        """
        timesteps = self.timesteps if schedule_timesteps is None else schedule_timesteps
        places = (timesteps == check_float("timestep", timestep, high=math.inf)).nonzero().flatten().tolist()
        if not places:
            raise InputError(
                f"timestep={float(timestep):g}: one of scheduler.timesteps would do, which go from "
                f"{timesteps[0]:g} down to {timesteps[-1]:g}"
            )
        return places[:2][-1]

    def find_step_index(self, timestep: float | Tensor) -> int:
        """The index of this step: the first timestep says where a walk starts, then they are counted."""
        if self.step_index is None:
            self.step_index = self.index_for_timestep(timestep) if self.begin_index is None else self.begin_index
        if self.step_index >= len(self.timesteps):
            raise InputError(f"step: all {len(self.timesteps)} timesteps are done; set_timesteps begins another run")
        here = self.timesteps[self.step_index]
        near = all(not isinstance(t, Tensor) or t.device.type == "cpu" for t in (here, timestep))  # else one would wait
        if (
            self.begin_index is None
            and near
            and abs(check_float("timestep", timestep, high=math.inf) - float(here)) >= 1
        ):
            raise InputError(
                f"timestep={short_repr(timestep)}: the walk has come to {here:g}; scheduler.timesteps, one "
                "after another, would do",
                key="timestep",
            )
        return self.step_index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """What the network is short_repr of `sample`: the same at unit variance. To be called before every step."""
        sigma = self.sigmas[self.find_step_index(timestep)]
        self.is_scale_input_called = True
        return sample / (sigma**2 + 1) ** 0.5

    def slope_weights(self, index: int, order: int) -> list[float]:
        """How much each of the last `order` slopes counts in step number `index`, the newest first."""
        past = self.sigmas[index - order + 1 : index + 1].flip(0)
        return lms_weights(past.numpy(), float(self.sigmas[index + 1]))

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        """The weight of the slope `current_order` steps back, of `order` slopes, in step number `t`."""
        weights = self.slope_weights(t, check_int("order", order, high=t + 1))
        return weights[check_int("current_order", current_order, low=0, high=order - 1)]

    @validated(check_step_inputs)
    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, order: int = 4, return_dict: bool = True
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:
        """From `sample` to the next noise level, both (b, c, h, w), with the x_0 predicted on the way.

        `order`: how many of the last slopes count, 1 or more. Raises `InputError` for a timestep that is not in
        `timesteps`, or when all are done. Warns where `scale_model_input` was never called.
        """
        if not self.is_scale_input_called:
            warnings.warn(
                "step: scale_model_input was not called, so the network may have seen a wrong scale", stacklevel=3
            )
        order, i = check_int("order", order), self.find_step_index(timestep)
        sigma = self.sigmas[i]
        x0 = to_denoised(self.config.prediction_type, model_output, sample, sigma)
        self.derivatives = [*self.derivatives, (sample - x0) / sigma][-max(order, len(self.derivatives)) :]
        # a walk that starts at a later index has fewer slopes than weights; the reference lets the rest go, too
        weighted = zip(self.slope_weights(i, min(i + 1, order)), reversed(self.derivatives), strict=False)
        prev = sample + sum(weight * slope for weight, slope in weighted)
        self.step_index = i + 1
        return DenoisedOutput(prev, x0) if return_dict else (prev, x0)

    @validated(check_noise_inputs)
    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_0 + sigma noise, both (b, ...), at `timesteps`, (b,), each one of `self.timesteps`.

        Once `set_begin_index` was called the walk's own place counts instead, as in image-to-image.
        """
        times = torch.as_tensor(timesteps).flatten()
        if self.begin_index is None:
            places = [self.index_for_timestep(t) for t in times]
        else:
            places = [self.begin_index if self.step_index is None else self.step_index] * len(times)
        sigma = self.sigmas.to(original_samples.device, original_samples.dtype)[places]
        return original_samples + noise * sigma.view(-1, *[1] * (original_samples.ndim - 1))
