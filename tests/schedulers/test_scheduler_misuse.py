"""Misuse of the schedulers: configs that divide by 0, steps out of order, invalid timesteps."""

import numpy as np
import pytest
import torch

from imvar import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    InputError,
    InputTypeError,
    LMSDiscreteScheduler,
    PNDMScheduler,
)
from tests.support.random_checkpoint import PUBLISHED_SCHEDULER

SIGMA_SPACE = [
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
]
ALL = [DDIMScheduler, DDPMScheduler, PNDMScheduler, *SIGMA_SPACE]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DDIMScheduler, {"beta_start": 0, "beta_end": 0}),
        (DDIMScheduler, {"beta_start": 1, "beta_end": 1}),
        (PNDMScheduler, {"beta_start": 0}),
        (PNDMScheduler, {"beta_end": 1}),
        (PNDMScheduler, {"trained_betas": [0.0] * 1000}),
        (PNDMScheduler, {"trained_betas": [1.0] * 1000}),
        (DDPMScheduler, {"beta_start": 0, "beta_end": 0}),
        (DDPMScheduler, {"beta_start": 1, "beta_end": 1}),
        *((kind, {"beta_start": 0, "beta_end": 0}) for kind in SIGMA_SPACE),
        *((kind, {"beta_end": 1}) for kind in SIGMA_SPACE),
        (EulerDiscreteScheduler, {"beta_start": 0, "use_karras_sigmas": True}),
        (DPMSolverMultistepScheduler, {"beta_start": 0, "use_karras_sigmas": True}),
    ],
)
def test_noise_levels_that_divide_by_zero(kind, settings):
    with pytest.raises(InputError, match="betas"):
        kind(**settings).set_timesteps(10)


@pytest.mark.parametrize("kind", SIGMA_SPACE)
def test_steps_out_of_order(kind):
    """A scheduler that counts its steps refuses another timestep than the next, and a step after the last."""
    x = torch.randn(1, 4, 8, 8)
    counted = kind()
    counted.set_timesteps(5)
    counted.scale_model_input(x, counted.timesteps[0])
    counted.step(x, counted.timesteps[0], x)
    for wrong in (counted.timesteps[3], None, "x", float("nan"), 500):
        with pytest.raises(InputError, match="timestep: expected"):
            counted.step(x, wrong, x)
    assert counted.step_index == 1
    for cast in (int, float, np.int64, torch.tensor, lambda t: torch.tensor(t).half()):  # a timestep of any type
        counted.set_timesteps(7)
        for t in counted.timesteps[:1].tolist():
            counted.scale_model_input(x, t)
        counted.step(x, cast(counted.timesteps[0].item()), x)
        counted.step(x, cast(counted.timesteps[1].item()), x)
    counted.set_timesteps(10)
    counted.timesteps, counted.sigmas = counted.timesteps[4:], counted.sigmas[4:]  # from the middle
    for t in counted.timesteps:
        counted.step(counted.scale_model_input(x, t), t, x)
    for scheduler in (kind(), PNDMScheduler(**PUBLISHED_SCHEDULER)):
        scheduler.set_timesteps(5)
        for t in scheduler.timesteps:
            scheduler.step(scheduler.scale_model_input(x, t), t, x)
        with pytest.raises(InputError, match=rf"timestep: expected at most {len(scheduler.timesteps)} steps a run"):
            scheduler.step(x, scheduler.timesteps[0], x)
        scheduler.set_timesteps(5)
        scheduler.scale_model_input(x, scheduler.timesteps[0])
        scheduler.step(x, scheduler.timesteps[0], x)


@pytest.mark.parametrize("kind", ALL)
def test_one_timestep_for_all_samples(kind):
    x, noise = torch.randn(2, 2, 4, 8, 8)
    scheduler = kind()
    expected = scheduler.add_noise(x, noise, torch.tensor([500, 500]))
    for t in (500, torch.tensor(500), torch.tensor([500])):
        assert torch.equal(scheduler.add_noise(x, noise, t), expected)
    for wrong in (torch.tensor([True, False]), torch.tensor([1j, 2j]), 2**70, None, "5", [500, 500]):
        with pytest.raises(InputError, match="timestep"):
            scheduler.add_noise(x, noise, wrong)
    for samples in (torch.ones(2, 4, 8, 8, dtype=torch.int64), x > 0, x.to(torch.complex64)):
        with pytest.raises(InputTypeError, match=r"original_samples: expected .*, got values of"):
            scheduler.add_noise(samples, noise, torch.tensor([500]))


def test_pure_signal_and_pure_noise_at_timesteps_that_are_not_sampled():
    for settings in ({"beta_start": 0.0, "steps_offset": 1}, {"trained_betas": [*[0.001] * 999, 1.0]}):
        scheduler = PNDMScheduler(skip_prk_steps=True, **settings)
        scheduler.set_timesteps(10)
        x = torch.randn(1, 4, 8, 8)
        for t in scheduler.timesteps:
            x = scheduler.step(x, t, x).prev_sample
        assert x.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (EulerDiscreteScheduler, {"num_inference_steps": 5, "sigmas": [2, 0]}, "num_inference_steps and sigmas"),
        (DPMSolverMultistepScheduler, {"num_inference_steps": 5, "timesteps": [5]}, "got num_inference_steps and"),
        (DDPMScheduler, {"num_inference_steps": 5, "timesteps": [5]}, "expected one of them, got num_inference_steps"),
        (EulerDiscreteScheduler, {"sigmas": [2.0]}, "sigmas: expected a list of 2 or more descending numbers"),
        (EulerDiscreteScheduler, {"sigmas": [2.0, 3.0, 0.0]}, "sigmas: expected a list of 2 or more descending"),
        (EulerDiscreteScheduler, {"sigmas": [float("nan"), 0.0]}, "sigmas: expected a list of 2 or more descending"),
        (EulerDiscreteScheduler, {"timesteps": "abc"}, "timesteps: expected a list of 1 or more descending numbers"),
        (DDPMScheduler, {"timesteps": [1000, 5]}, "timesteps: expected .* numbers from 0 to 999"),
        (DDPMScheduler, {"timesteps": [5, 5]}, "timesteps: expected .* descending numbers"),
        (DPMSolverMultistepScheduler, {"timesteps": []}, r"timesteps: expected a list of 1 or more .*, got \[\]"),
        (DPMSolverMultistepScheduler, {"num_inference_steps": 5, "mu": 1.0}, "mu: expected None, got 1.0; dynamic"),
    ],
)
def test_schedules_that_are_refused(kind, given, message):
    scheduler = kind()
    before = scheduler.timesteps
    with pytest.raises(InputError, match=message):
        scheduler.set_timesteps(**given)
    assert scheduler.timesteps is before


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_timesteps_of_ones_own_with_a_spacing_of_sigmas(kind):
    with pytest.raises(InputError, match="timesteps: expected None with use_karras_sigmas=True, got timesteps; pass"):
        kind(use_karras_sigmas=True).set_timesteps(timesteps=[900, 5])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DDPMScheduler, {"variance_type": "learned"}),
        (DDPMScheduler, {"variance_type": "learned_range"}),
        (DDPMScheduler, {"variance_type": "fixed_large_log"}),  # NaN in diffusers
        (DDPMScheduler, {"beta_schedule": "sigmoid"}),
        (EulerAncestralDiscreteScheduler, {"prediction_type": "sample"}),
        (EulerDiscreteScheduler, {"interpolation_type": "log_linear"}),
        (EulerDiscreteScheduler, {"timestep_type": "continuous"}),
        (DPMSolverMultistepScheduler, {"variance_type": "learned_range"}),
        (DPMSolverMultistepScheduler, {"prediction_type": "flow_prediction"}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver"}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver"}),
        (DPMSolverMultistepScheduler, {"solver_order": 3}),
        (DPMSolverMultistepScheduler, {"use_lu_lambdas": True}),
        (DPMSolverMultistepScheduler, {"use_flow_sigmas": True}),
        (DPMSolverMultistepScheduler, {"use_dynamic_shifting": True}),
        (DPMSolverMultistepScheduler, {"lambda_min_clipped": -5.1}),
    ],
    ids=str,
)
def test_options_of_diffusers_that_are_not_implemented(kind, settings):
    (name, value), *_ = settings.items()
    with pytest.raises(InputError, match=rf"{name}: expected .*, got {value!r}"):
        kind(**settings)


def test_a_level_that_repeats_has_no_slope():
    """Among 1,000 timesteps of DPM-Solver one repeats; diffusers divides by its distance, 0."""
    scheduler, x = DPMSolverMultistepScheduler(), torch.randn(1, 4, 8, 8)
    scheduler.set_timesteps(1000)
    assert len(scheduler.timesteps.unique()) < 1000
    for t in scheduler.timesteps:
        x = scheduler.step(x.sin(), t, x).prev_sample
    assert x.isfinite().all()


@pytest.mark.parametrize("spacing", ["use_exponential_sigmas", "use_beta_sigmas", "use_karras_sigmas"])
def test_a_run_whose_first_timestep_repeats(spacing):
    """It takes all its steps; diffusers starts at the second of them and fails at the last."""
    scheduler, x = (
        DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", **{spacing: True}),
        torch.randn(1, 4, 8, 8),
    )
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    for t in scheduler.timesteps:
        x = scheduler.step(x.sin(), t, x).prev_sample
    assert scheduler.step_index == 20


def test_add_noise_compiles():
    scheduler, t = DDIMScheduler(), torch.tensor([500, 3])
    x, noise = torch.randn(2, 2, 4, 8, 8)
    compiled = torch.compile(scheduler.add_noise, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, noise, t), scheduler.add_noise(x, noise, t))
