"""Misuse of the schedulers: configs that divide by 0, steps out of order, invalid timesteps."""

import numpy as np
import pytest
import torch

from imvar import DDIMScheduler, InputError, InputTypeError, LMSDiscreteScheduler, PNDMScheduler
from tests.support.random_checkpoint import PUBLISHED_SCHEDULER


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DDIMScheduler, {"beta_start": 0, "beta_end": 0}),
        (DDIMScheduler, {"beta_start": 1, "beta_end": 1}),
        (PNDMScheduler, {"beta_start": 0}),
        (PNDMScheduler, {"beta_end": 1}),
        (PNDMScheduler, {"trained_betas": [0.0] * 1000}),
        (PNDMScheduler, {"trained_betas": [1.0] * 1000}),
        (LMSDiscreteScheduler, {"beta_start": 0, "beta_end": 0}),
    ],
)
def test_noise_levels_that_divide_by_zero(kind, settings):
    with pytest.raises(InputError, match="betas"):
        kind(**settings).set_timesteps(10)


def test_steps_out_of_order():
    """A scheduler that counts its steps refuses another timestep than the next, and a step after the last."""
    x = torch.randn(1, 4, 8, 8)
    lms = LMSDiscreteScheduler()
    lms.set_timesteps(5)
    lms.scale_model_input(x, lms.timesteps[0])
    for wrong in (lms.timesteps[3], None, "x", float("nan"), 500):
        with pytest.raises(InputError, match="timestep: expected"):
            lms.step(x, wrong, x)
    assert lms.step_index == 0
    for kind in (int, float, np.int64, torch.tensor, lambda t: torch.tensor(t).half()):  # a timestep of any type
        lms.set_timesteps(7)
        for t in lms.timesteps[:1].tolist():
            lms.scale_model_input(x, t)
        lms.step(x, kind(lms.timesteps[0].item()), x)
        lms.step(x, kind(lms.timesteps[1].item()), x)
    lms.set_timesteps(10)
    lms.timesteps, lms.sigmas = lms.timesteps[4:], lms.sigmas[4:]  # from the middle
    for t in lms.timesteps:
        lms.step(lms.scale_model_input(x, t), t, x)
    for kind in (LMSDiscreteScheduler, PNDMScheduler):
        scheduler = kind(**(PUBLISHED_SCHEDULER if kind is PNDMScheduler else {}))
        scheduler.set_timesteps(5)
        for t in scheduler.timesteps:
            scheduler.step(scheduler.scale_model_input(x, t), t, x)
        with pytest.raises(InputError, match=rf"timestep: expected at most {len(scheduler.timesteps)} steps a run"):
            scheduler.step(x, scheduler.timesteps[0], x)
        scheduler.set_timesteps(5)
        scheduler.scale_model_input(x, scheduler.timesteps[0])
        scheduler.step(x, scheduler.timesteps[0], x)


@pytest.mark.parametrize("kind", [DDIMScheduler, PNDMScheduler, LMSDiscreteScheduler])
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


def test_add_noise_compiles():
    scheduler, t = DDIMScheduler(), torch.tensor([500, 3])
    x, noise = torch.randn(2, 2, 4, 8, 8)
    compiled = torch.compile(scheduler.add_noise, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, noise, t), scheduler.add_noise(x, noise, t))
