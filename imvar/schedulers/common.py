"""What the schedulers share: what a network predicts, the settings and base classes.

`alpha` is the share of signal left in x_t, DDIM's alpha_t and DDPM's cumulative product. It stays a
0-d float32 tensor on the CPU: next to a tensor of any dtype and device it counts as a number, and
Python floats would compute in double, a last bit away from the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..checks import check_float, check_floating, check_has_data, check_int, check_same_shape, item, validated
from ..config import Config, one_of
from ..errors import InputError, InputTypeError, short_repr
from ..noise import check_generator
from ..outputs import SchedulerOutput
from ..weights.configured import ConfiguredComponent
from .timesteps import make_betas


class SchedulerLike(Protocol):
    """All that the pipeline asks of a scheduler; any object that has these five will do."""

    timesteps: Any

    @property
    def init_noise_sigma(self) -> float | Tensor: ...
    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None: ...
    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor: ...
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, /) -> SchedulerOutput | tuple[Tensor, ...]: ...


# What a network predicts, section 2.4 of arXiv:2202.00512: x = signal x0 + noise eps, v = signal eps - noise x0


def to_x0(kind: str, output: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    """The clean sample that a network's output implies at x."""
    signal, noise = alpha**0.5, (1 - alpha) ** 0.5
    if kind == "epsilon":
        return (x - noise * output) / signal
    return signal * x - noise * output if kind == "v_prediction" else output


def to_eps(kind: str, output: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    """The noise that a network's output implies at x."""
    signal, noise = alpha**0.5, (1 - alpha) ** 0.5
    if kind == "sample":
        return (x - signal * output) / noise
    return signal * output + noise * x if kind == "v_prediction" else output


# The classes

MAX_TIMESTEPS = 10_000  # every table has as many entries


@dataclass(frozen=True, eq=False, repr=False)
class SchedulerConfig(Config):
    """The settings that every scheduler begins with. Raises `InputError` for values out of range."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001  # 0 to 1, as is beta_end
    beta_end: float = 0.02
    beta_schedule: str = one_of("linear", "scaled_linear", "squaredcos_cap_v2")
    trained_betas: Sequence[float] | np.ndarray | None = None  # (num_train_timesteps,), in place of a schedule

    def check(self) -> None:
        super().check()
        steps = check_int("num_train_timesteps", self.num_train_timesteps, high=MAX_TIMESTEPS)
        check_float("beta_start", self.beta_start)
        check_float("beta_end", self.beta_end)
        check_int("steps_offset", getattr(self, "steps_offset", 0), low=0, high=MAX_TIMESTEPS)
        if self.trained_betas is None:
            return
        try:
            betas = np.asarray(self.trained_betas, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputTypeError(
                f"trained_betas={short_repr(self.trained_betas)}: a list of numbers would do", key="trained_betas"
            ) from error
        if betas.shape != (steps,):
            raise InputError(
                f"trained_betas: shape {betas.shape} came; ({steps},), one for each of num_train_timesteps, would do",
                key="trained_betas",
            )
        if not ((betas >= 0) & (betas <= 1)).all():
            raise InputError(
                f"trained_betas: {betas.min():g} to {betas.max():g} came; numbers from 0 to 1 would do",
                key="trained_betas",
            )


def check_signal_range(scheduler: Any, alphas: Tensor) -> None:
    """The timesteps of a walk leave some of the signal, and not all of it, so that no step divides by 0."""
    low, high = (float(share) for share in alphas.aminmax())
    if low <= 0 or high >= 1:
        raise InputError(
            f"beta_start, beta_end, trained_betas: with these, from {low:g} to {high:g} of the signal "
            f"is left, and {type(scheduler).__name__} divides by 0 at the ends; numbers between 0 and 1 "
            "would do",
            key="beta_start",
        )


def check_step_inputs(scheduler: Any, model_output: Any, timestep: Any, sample: Any, *_: Any, **options: Any) -> None:
    """Of a step: floats of one shape, also what is to be its noise."""
    if not isinstance(sample, Tensor):
        raise InputTypeError(f"sample: {type(sample).__name__} came; a tensor (b, c, h, w) would do", key="sample")
    check_floating("sample", sample)
    check_same_shape("model_output", model_output, "sample", sample)
    generators = options.get("generator")
    one = not sample.ndim or (isinstance(generators, (list, tuple)) and len(generators) == 1)
    check_generator(generators, 1 if one else len(sample))
    if options.get("variance_noise") is not None:
        check_same_shape("variance_noise", options["variance_noise"], "sample", sample)


def check_noise_inputs(scheduler: Any, original_samples: Any, noise: Any, timesteps: Any) -> None:
    """Of samples and noise that are mixed: one shape, and a time for all or for each."""
    if not isinstance(original_samples, Tensor) or not original_samples.ndim:
        raise InputTypeError(
            f"original_samples: {type(original_samples).__name__} came; a tensor (b, ...) would do",
            key="original_samples",
        )
    check_floating("original_samples", original_samples)
    check_same_shape("noise", noise, "the samples", original_samples)
    if isinstance(timesteps, Tensor) and not original_samples.is_meta:
        check_has_data("timesteps", timesteps)
    times = as_timestep_tensor(timesteps)
    if times is None or times.ndim > 1 or (times.ndim and len(times) not in (1, len(original_samples))):
        came = type(timesteps).__name__ if times is None else f"shape {tuple(times.shape)}"
        raise InputError(
            f"timesteps: {came} came for {len(original_samples)} samples; a tensor of one for all, or of "
            "one each, would do",
            key="timesteps",
        )


def as_timestep_tensor(timesteps: Any) -> Tensor | None:
    """A number, or a tensor of numbers, as a tensor; None for anything else."""
    if isinstance(timesteps, bool) or not isinstance(timesteps, (int, float, Tensor)):
        return None
    try:
        return torch.as_tensor(timesteps)
    except (RuntimeError, ValueError, OverflowError):  # a number too large
        return None


class Scheduler(ConfiguredComponent):
    """A walk from noise to a picture: tables that say how noisy each timestep is, and where the walk stands.

    Attributes: `betas`, `alphas`, `alphas_cumprod`, each (num_train_timesteps,); `timesteps`, those to
    visit; `num_inference_steps`, as asked for. No step writes into a tensor or list that it was given or
    gave out, so even a shallow copy is a walk of its own.
    """

    config_name = "scheduler_config.json"
    config_class = SchedulerConfig
    order = 1
    num_inference_steps: int | None = None

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.betas = self.make_betas()
        self.alphas = 1 - self.betas
        self.alphas_cumprod = self.alphas.cumprod(0)

    def make_betas(self) -> Tensor:
        return make_betas(self.config)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


class VariancePreserving(Scheduler):
    """A walk along x_t = sqrt(alpha) x_0 + sqrt(1 - alpha) noise, on whole timesteps: DDIM and PNDM.

    `final_alpha_cumprod` is the alpha where the walk ends: 1, or that of timestep 0 without `set_alpha_to_one`.
    """

    init_noise_sigma = 1.0

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.final_alpha_cumprod = torch.tensor(1.0) if self.config.set_alpha_to_one else self.alphas_cumprod[0]

    @property
    def stride(self) -> int:
        """How far apart in training the steps are; not the distance to the next entry of `timesteps`."""
        if self.num_inference_steps is None:
            raise InputError("step: the scheduler has no timesteps yet; call set_timesteps first")
        return self.config.num_train_timesteps // self.num_inference_steps

    def timestep_index(self, timestep: Any) -> int:
        """A timestep, given as a number or as a tensor that holds one; `InputError` if training had no such."""
        return check_int("timestep", item(timestep), low=0, high=len(self) - 1)

    def alpha(self, timestep: int) -> Tensor:
        """The alpha of a timestep, 0-d; below 0 the walk has ended."""
        return self.alphas_cumprod[timestep] if timestep >= 0 else self.final_alpha_cumprod

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network is short_repr of `sample`: here, `sample` itself."""
        return sample

    @validated(check_noise_inputs)
    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t from x_0 and noise, both (b, ...), at `timesteps`, (b,) or (): equation 4 of arXiv:2010.02502."""
        signal, sigma = self.signal_and_noise(original_samples, timesteps)
        return signal * original_samples + sigma * noise

    def signal_and_noise(self, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The shares of signal and noise at each timestep, in x's dtype, shaped to multiply x."""
        timesteps = torch.as_tensor(timesteps)
        if timesteps.is_floating_point() or timesteps.is_complex() or timesteps.dtype == torch.bool:
            raise InputTypeError(
                f"timesteps: values of {timesteps.dtype} came; whole numbers would do", key="timesteps"
            )
        timesteps = timesteps.long()  # as bytes would choose by being there
        readable = timesteps.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and not ((timesteps >= 0) & (timesteps < len(self))).all():
            raise InputError(f"timesteps={timesteps.tolist()}: values from 0 to {len(self) - 1} would do")
        alpha = self.alphas_cumprod.to(x.device, x.dtype)[timesteps.to(x.device)]
        alpha = alpha.view(-1, *[1] * (x.ndim - 1))  # b -> b 1 1 1
        return alpha**0.5, (1 - alpha) ** 0.5
