"""Shared by the schedulers: conversions between prediction types, the config and the base classes.

`alpha` is the share of signal variance in x_t: alpha_t of DDIM, the cumulative product of 1 - beta in DDPM. It is kept
as a 0-d float32 tensor on the CPU: PyTorch treats that as a scalar next to a tensor of any dtype and device, whereas
Python floats would compute in double and differ from diffusers in the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..checks import check_float, check_floating, check_has_data, check_int, check_same_shape, validated
from ..config import Config, one_of
from ..errors import InputError, InputTypeError, describe, invalid, short_repr
from ..noise import check_generator, randn
from ..weights.configured import ConfiguredComponent
from ..weights.model_index import PARTS
from .timesteps import make_betas, zero_terminal_snr

# Prediction types, section 4 of arXiv:2202.00512: x = signal x0 + noise eps, v = signal eps - noise x0


def to_x0(kind: str, output: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    """Convert a model output at x to the predicted x_0."""
    signal, noise = alpha**0.5, (1 - alpha) ** 0.5
    if kind == "epsilon":
        return (x - noise * output) / signal
    return signal * x - noise * output if kind == "v_prediction" else output


def to_eps(kind: str, output: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    """Convert a model output at x to the predicted noise."""
    signal, noise = alpha**0.5, (1 - alpha) ** 0.5
    if kind == "sample":
        return (x - signal * output) / noise
    return signal * output + noise * x if kind == "v_prediction" else output


# The classes

MAX_TIMESTEPS = 10_000  # the length of every table
TABLE_FIELDS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "set_alpha_to_one",
)  # the fields of all configs on which tables depend


@dataclass(frozen=True, eq=False, repr=False)
class SchedulerConfig(Config):
    """Config fields common to all schedulers. Raises `InputError` for values out of range."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001  # 0 to 1, as is beta_end
    beta_end: float = 0.02
    beta_schedule: str = one_of("linear", "scaled_linear", "squaredcos_cap_v2")
    trained_betas: Sequence[float] | np.ndarray | None = None  # (num_train_timesteps,), overrides beta_schedule

    @property
    def rescales_betas(self) -> bool:
        """Whether `rescale_betas_zero_snr` is a field of this class, not of another scheduler's config, and True."""
        return bool(vars(self).get("rescale_betas_zero_snr"))

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
            got = short_repr(self.trained_betas)
            raise invalid(InputTypeError, "trained_betas", "a list of numbers", got) from error
        if betas.shape != (steps,):
            expected = f"shape ({steps},), one number for each of num_train_timesteps"
            raise invalid(InputError, "trained_betas", expected, f"shape {betas.shape}")
        if not ((betas >= 0) & (betas <= 1)).all():
            raise invalid(InputError, "trained_betas", "numbers from 0 to 1", f"{betas.min():g} to {betas.max():g}")


def check_step_inputs(scheduler: Any, model_output: Any, timestep: Any, sample: Any, *_: Any, **options: Any) -> None:
    """Check that the tensors of a step are floating-point and of one shape, and its generators one or b."""
    check_floating("sample", sample, "a tensor (b, c, h, w)")
    check_same_shape("model_output", model_output, "sample", sample)
    generators = options.get("generator")
    is_single = not sample.ndim or (isinstance(generators, (list, tuple)) and len(generators) == 1)
    check_generator(generators, 1 if is_single else len(sample))
    if options.get("variance_noise") is not None:
        check_same_shape("variance_noise", options["variance_noise"], "sample", sample)


def check_noise_inputs(scheduler: Any, original_samples: Any, noise: Any, timesteps: Any) -> None:
    """Check that samples and noise have one shape, and that there is one timestep, or one per sample."""
    check_floating("original_samples", original_samples, "a tensor (b, ...)")
    if not original_samples.ndim:
        raise invalid(InputTypeError, "original_samples", "a tensor (b, ...)", describe(original_samples))
    check_same_shape("noise", noise, "the samples", original_samples)
    if isinstance(timesteps, Tensor) and not original_samples.is_meta:
        check_has_data("timesteps", timesteps)
    batch, is_number = len(original_samples), isinstance(timesteps, (int, float)) and not isinstance(timesteps, bool)
    shape = timesteps.shape if isinstance(timesteps, Tensor) else () if is_number and abs(timesteps) < 2**63 else None
    if shape not in ((), (1,), (batch,)):
        expected = f"a tensor of one timestep for all {batch} samples, or of one each"
        raise invalid(InputError, "timesteps", expected, describe(timesteps))


def given_noise(variance_noise: Tensor | None, generator: Any, like: Tensor) -> Tensor:
    """Return the noise of a step: `variance_noise`, or noise of the shape and dtype of `like` from `generator`."""
    if variance_noise is None:
        return randn(like.shape, generator, dtype=like.dtype, device=like.device)
    if generator is not None:
        raise invalid(InputError, "variance_noise, generator", "one of them", "both", key="variance_noise")
    return variance_noise


class Scheduler(ConfiguredComponent):
    """Base class of the schedulers: the noise schedule of training, and the state of a sampling run.

    Attributes: `betas`, `alphas`, `alphas_cumprod`, each (num_train_timesteps,); `timesteps`, those of the run in
    order; `num_inference_steps`, as passed to `set_timesteps`. No step writes into a tensor or list that it received
    or returned, so even a shallow copy can be stepped independently.
    """

    config_name = "scheduler_config.json"
    config_class = SchedulerConfig
    has_compatibles = True
    _compatibles: ClassVar = [
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
    ]
    order = 1
    num_inference_steps: int | None = None
    timesteps: Any = None

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.make_tables()

    def make_tables(self) -> None:
        """Compute what depends on the config alone. A run has to start again."""
        self.num_inference_steps = None
        self.betas = self.make_betas()
        self.alphas = 1 - self.betas
        self.alphas_cumprod = self.alphas.cumprod(0)

    def register_to_config(self, **changes: Any) -> None:
        """Update `config`. New values of `TABLE_FIELDS` recompute the tables and end a run."""
        before, old = dict(vars(self)), self.config
        super().register_to_config(**changes)
        if all(np.array_equal(old.get(name), self.config.get(name)) for name in TABLE_FIELDS):
            return
        try:
            self.make_tables()
        except InputError:
            vars(self).update(before)
            raise

    @property
    def compatibles(self) -> list[type[Scheduler]]:
        """imvar's schedulers, each of which `from_config` makes from the config of another."""
        return [PARTS[self.part][name] for name in self._compatibles]

    def make_betas(self) -> Tensor:
        betas = make_betas(self.config)
        return zero_terminal_snr(betas) if self.config.rescales_betas else betas

    def check_betas(self, usable: Any, expected: str, got: str) -> None:
        """Raise `InputError` about the betas unless they are usable."""
        if not usable:
            names, hint = "beta_start, beta_end, trained_betas", "use numbers between 0 and 1"
            raise invalid(InputError, names, expected, got, hint, key="beta_start")

    def check_steps_left(self, steps_done: int) -> None:
        """Check that a run has steps left after `steps_done`."""
        if steps_done >= (n := len(self.timesteps)):
            hint = "call set_timesteps to start another run"
            raise invalid(InputError, "timestep", f"at most {n} steps a run", "one more", hint)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


class VariancePreserving(Scheduler):
    """Base class of DDIM, PNDM and DDPM: x_t = sqrt(alpha) x_0 + sqrt(1 - alpha) noise, at integer timesteps."""

    init_noise_sigma = 1.0

    def check_some_noise_and_signal(self) -> None:
        """Raise `InputError` for betas that leave no noise, or no signal, at every timestep."""
        usable = self.alphas_cumprod[-1] != 1 and self.alphas_cumprod[0] != 0
        self.check_betas(usable, "betas that leave noise and signal", "no noise, or no signal, at every timestep")

    def timestep_index(self, timestep: Any) -> int:
        """Return a timestep, a number or one-element tensor, as an int. Raises `InputError` if it is out of range."""
        if isinstance(timestep, Tensor) and timestep.numel() == 1 and not timestep.is_meta:
            timestep = timestep.item()
        is_integral = isinstance(timestep, float) and timestep.is_integer()
        return check_int("timestep", int(timestep) if is_integral else timestep, low=0, high=len(self) - 1)

    def check_signal(self, t: int) -> None:
        """Raise `InputError` for a timestep without signal if x_0 is its quotient and nothing limits it."""
        config = self.config
        if (
            self.alphas_cumprod[t] == 0
            and config.prediction_type == "epsilon"
            and not (config.thresholding or config.clip_sample)
        ):
            expected = "a timestep with some signal, by which prediction_type='epsilon' divides"
            hint = "use 'v_prediction' or timestep_spacing='leading'"
            raise invalid(InputError, "timestep", expected, f"{t}, which has none", hint)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return `sample`: the UNet's input is not scaled."""
        return sample

    @validated(check_noise_inputs)
    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t for x_0 and noise, both (b, ...), at `timesteps`, (b,) or (): equation 4 of arXiv:2010.02502."""
        signal, sigma = self.signal_and_noise(original_samples, timesteps)
        return signal * original_samples + sigma * noise

    def signal_and_noise(self, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(alpha) and sqrt(1 - alpha) of each timestep, in x's dtype, shaped to broadcast against x."""
        timesteps = torch.as_tensor(timesteps)
        if timesteps.is_floating_point() or timesteps.is_complex() or timesteps.dtype == torch.bool:
            raise invalid(InputTypeError, "timesteps", "integers", f"values of {timesteps.dtype}")
        timesteps = timesteps.long()  # uint8 would index as a mask
        readable = timesteps.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and not ((timesteps >= 0) & (timesteps < len(self))).all():
            got = short_repr(timesteps.tolist())
            raise invalid(InputError, "timesteps", f"integers from 0 to {len(self) - 1}", got)
        alpha = self.alphas_cumprod.to(x.device, x.dtype)[timesteps.to(x.device)]
        alpha = alpha.view(-1, *[1] * (x.ndim - 1))  # b -> b 1 1 1
        return alpha**0.5, (1 - alpha) ** 0.5


class StridedScheduler(VariancePreserving):
    """Base class of DDIM and PNDM, whose steps go down one stride, whatever the next entry of `timesteps` is.

    `final_alpha_cumprod` is the alpha after the last step: 1, or that of timestep 0 without `set_alpha_to_one`.
    """

    def make_tables(self) -> None:
        super().make_tables()
        one = torch.ones((), device="cpu")
        self.final_alpha_cumprod = one if self.config.set_alpha_to_one else self.alphas_cumprod[0]

    @property
    def stride(self) -> int:
        """Training timesteps per sampling step."""
        if self.num_inference_steps is None:
            raise invalid(InputError, "num_inference_steps", "a call of set_timesteps before step", "none")
        return self.config.num_train_timesteps // self.num_inference_steps

    def alpha(self, timestep: int) -> Tensor:
        """Return the alpha of a timestep, 0-d; below 0 that after the last step."""
        return self.alphas_cumprod[timestep] if timestep >= 0 else self.final_alpha_cumprod
