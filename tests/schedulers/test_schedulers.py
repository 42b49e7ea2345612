"""The schedulers without the reference: properties of the formulas, state between steps, invalid arguments."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from imvar.errors import CheckpointError, InputError, InputTypeError
from imvar.noise import randn
from imvar.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)
from imvar.schedulers.common import to_eps, to_x0
from imvar.schedulers.ddim import ddim_sigma, ddim_step
from imvar.schedulers.ddpm import posterior_mean, posterior_sigma
from imvar.schedulers.dpm_solver import dpm_solver_step, signal_and_sigma
from imvar.schedulers.euler import euler_step
from imvar.schedulers.euler_ancestral import ancestral_sigmas
from imvar.schedulers.lms import lms_weights
from imvar.schedulers.pndm import adams_bashforth, transfer
from imvar.schedulers.thresholding import dynamic_threshold
from imvar.schedulers.timesteps import beta_quantile, make_betas, zero_terminal_snr

ALL = [
    pytest.param(DDIMScheduler, {"clip_sample": False}, id="ddim"),
    pytest.param(PNDMScheduler, {"set_alpha_to_one": True}, id="pndm"),
    pytest.param(PNDMScheduler, {"set_alpha_to_one": True, "skip_prk_steps": True}, id="plms"),
    pytest.param(LMSDiscreteScheduler, {}, id="lms"),
    pytest.param(EulerDiscreteScheduler, {}, id="euler"),
    pytest.param(DPMSolverMultistepScheduler, {}, id="dpm"),
    pytest.param(DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, id="dpm-karras"),
]
NOISY = [
    pytest.param(DDPMScheduler, {"clip_sample": False}, id="ddpm"),
    pytest.param(EulerAncestralDiscreteScheduler, {}, id="euler-a"),
    pytest.param(DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, id="sde-dpm"),
]
SIGMA_SPACE = [EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LMSDiscreteScheduler]  # with scaled inputs
CLASSES = [DDIMScheduler, DDPMScheduler, PNDMScheduler, DPMSolverMultistepScheduler, *SIGMA_SPACE]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape or (2, 4, 3, 3), generator=torch.Generator().manual_seed(seed))


def network(x: torch.Tensor, t: Any) -> torch.Tensor:
    return torch.sin(x) + float(t) / 1000


def run(scheduler: Any, x: torch.Tensor, timesteps: Any = None) -> torch.Tensor:
    torch.manual_seed(len(x))
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


# Formulas


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_predictions_agree_on_x0_and_noise(kind):
    x0, eps, alpha = noise(seed=1).double(), noise(seed=2).double(), torch.tensor(0.3, dtype=torch.float64)
    x = alpha**0.5 * x0 + (1 - alpha) ** 0.5 * eps
    output = {"epsilon": eps, "sample": x0, "v_prediction": alpha**0.5 * eps - (1 - alpha) ** 0.5 * x0}[kind]
    torch.testing.assert_close(to_x0(kind, output, x, alpha), x0)
    torch.testing.assert_close(to_eps(kind, output, x, alpha), eps)


def test_a_ddim_step_keeps_x0_and_noise_and_equals_pndm_transfer():
    x0, eps = noise(seed=1).double(), noise(seed=2).double()
    alpha, alpha_prev = torch.tensor([0.3, 0.6], dtype=torch.float64)
    x, x_prev = (a**0.5 * x0 + (1 - a) ** 0.5 * eps for a in (alpha, alpha_prev))
    torch.testing.assert_close(ddim_step(x0, eps, alpha_prev), x_prev)
    torch.testing.assert_close(transfer(x, eps, alpha, alpha_prev), x_prev)


def test_eta_scales_the_posterior_deviation_of_ddpm():
    alpha, alpha_prev = torch.tensor([0.3, 0.6], dtype=torch.float64)
    beta = 1 - alpha / alpha_prev
    torch.testing.assert_close(ddim_sigma(alpha, alpha_prev, 1.0) ** 2, (1 - alpha_prev) / (1 - alpha) * beta)
    assert ddim_sigma(alpha, alpha_prev, 0.0) == 0


def test_added_noise_keeps_the_variance():
    """Unit noise keeps unit variance at any eta, when x_0 is 0."""
    alpha, alpha_prev = torch.tensor([0.01, 0.02])
    eps, fresh = noise(100_000, seed=1), noise(100_000, seed=2)
    sigma = ddim_sigma(alpha, alpha_prev, 0.7)
    prev = ddim_step(torch.zeros(()), eps, alpha_prev, sigma) + sigma * fresh
    assert prev.var().item() == pytest.approx(0.98, rel=0.02)


def test_dynamic_threshold():
    small, large = noise() / 10, noise() * 10
    assert torch.equal(dynamic_threshold(small, 0.99, 1.0), small)
    assert torch.equal(dynamic_threshold(large, 0.5, 1.0), large.clamp(-1, 1))
    squeezed = dynamic_threshold(large, 0.9, 100.0)
    assert squeezed.abs().max() == 1
    assert ((squeezed.abs() == 1).flatten(1).float().mean(1) < 0.15).all()  # the others are scaled, not clipped
    assert dynamic_threshold(large.half(), 0.9, 100.0).dtype == torch.float16


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_bashforth_follows_polynomials(order):
    """`order` past slopes of a polynomial of lower degree give its exact mean over the next step."""
    polynomial = np.polynomial.Polynomial([0.5, -1.0, 2.0, 0.25][:order])
    slopes = [torch.tensor(polynomial(-k), dtype=torch.float64) for k in reversed(range(order))]
    integral = polynomial.integ()
    assert adams_bashforth(slopes).item() == pytest.approx(integral(1) - integral(0), rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_weights_follow_polynomials(order):
    past, to = np.array([2.0, 2.5, 4.0, 7.0], np.float32)[:order], 0.5
    polynomial = np.polynomial.Polynomial([0.5, -1.0, 2.0, 0.25][:order])
    integral = polynomial.integ()
    got = sum(w * polynomial(s) for w, s in zip(lms_weights(past, to), past, strict=True))
    assert got == pytest.approx(integral(0.5) - integral(2.0), abs=1e-5)  # float32, slopes up to 190


def test_lms_equals_adams_bashforth_on_even_levels():
    assert lms_weights(np.arange(4, 8, dtype=np.float32), 3.0) == pytest.approx(
        [-55 / 24, 59 / 24, -37 / 24, 9 / 24], rel=1e-6
    )


def test_beta_quantile():
    p = np.linspace(0, 1, 101)
    x = beta_quantile(p, 0.6)
    assert (x[0], x[50], x[100]) == (0, pytest.approx(0.5, abs=1e-14), 1)
    np.testing.assert_allclose(x + x[::-1], 1, atol=1e-14)
    np.testing.assert_allclose(beta_quantile(p, 1.0), p, atol=1e-14)  # Beta(1, 1) is uniform
    np.testing.assert_allclose(beta_quantile(p, 0.5), np.sin(np.pi / 2 * p) ** 2, atol=1e-13)  # arcsine


def test_euler_is_ddim_at_eta_0():
    """In the coordinates x / sqrt(alpha), whose noise level is sigma."""
    x0, eps = noise(seed=1).double(), noise(seed=2).double()
    alpha, alpha_prev = torch.tensor([0.3, 0.6], dtype=torch.float64)
    sigma, sigma_next = (((1 - a) / a) ** 0.5 for a in (alpha, alpha_prev))
    euler = euler_step(x0 + sigma * eps, x0, sigma, sigma_next)
    torch.testing.assert_close(euler, ddim_step(x0, eps, alpha_prev) / alpha_prev**0.5)


def test_dpm_solver_of_order_1_is_ddim_and_its_sde_is_ddpm():
    x, x0, fresh = (noise(seed=i).double() for i in (1, 2, 3))
    alpha, alpha_prev = torch.tensor([0.3, 0.6], dtype=torch.float64)
    levels = [((1 - a) / a) ** 0.5 for a in (alpha_prev, alpha)]
    ddim = ddim_step(x0, to_eps("sample", x0, x, alpha), alpha_prev)
    torch.testing.assert_close(dpm_solver_step(x, [x0], levels), ddim)
    ddpm = posterior_mean(x0, x, alpha, alpha_prev) + posterior_sigma("fixed_small", alpha, alpha_prev) * fresh
    torch.testing.assert_close(dpm_solver_step(x, [x0], levels, noise=fresh), ddpm)


@pytest.mark.parametrize("is_heun", [False, True])
def test_dpm_solver_of_order_2_follows_a_line(is_heun):
    """If x_0 is linear in lambda, heun is exact, and the midpoint rule has an error of the third order."""
    errors = []
    for h in (0.2, 0.1):
        lambdas = torch.tensor([0.5 + h, 0.5, 0.5 - h], dtype=torch.float64)
        levels = list((-lambdas).exp())
        x0s = [torch.ones(1, dtype=torch.float64) * (2 + 3 * x) for x in lambdas]
        alpha, sigma = signal_and_sigma(levels[1])
        x = 0.7 * alpha + sigma
        got = dpm_solver_step(x, x0s[1:], levels, is_heun)
        # the ODE in y = x / sigma is dy/dlambda = exp(lambda) x_0
        integral = (lambdas.exp() * (2 + 3 * lambdas - 3))[0] - (lambdas.exp() * (2 + 3 * lambdas - 3))[1]
        want = signal_and_sigma(levels[0])[1] * (x / sigma + integral)
        errors.append((got - want).abs().item())
    assert errors[0] < (1e-12 if is_heun else 1e-2)
    assert is_heun or errors[1] < errors[0] / 6


def test_ancestral_levels_add_up():
    sigma, sigma_next = torch.tensor([5.0, 2.0])
    down, up = ancestral_sigmas(sigma, sigma_next)
    torch.testing.assert_close(down**2 + up**2, sigma_next**2)
    for low in torch.logspace(-6, 0, 200):
        assert all(level.isfinite() for level in ancestral_sigmas(torch.tensor(157.4), low))


def test_zero_terminal_snr_ends_in_noise_and_begins_as_before():
    betas = make_betas(DDIMScheduler(beta_schedule="scaled_linear").config)
    rescaled = zero_terminal_snr(betas)
    assert (1 - rescaled).cumprod(0)[-1] == 0
    torch.testing.assert_close(rescaled[0], betas[0])


# Runs


@pytest.mark.parametrize("steps", [4, 5, 20])
@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        *ALL,
        (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}),
        (PNDMScheduler, {"set_alpha_to_one": True, "skip_prk_steps": True, "timestep_spacing": "trailing"}),
        (LMSDiscreteScheduler, {"timestep_spacing": "leading"}),
        (LMSDiscreteScheduler, {"timestep_spacing": "trailing", "use_karras_sigmas": True}),
        (LMSDiscreteScheduler, {"use_beta_sigmas": True}),
    ],
)
def test_a_perfect_noise_prediction_recovers_x0(cls, settings, steps):
    scheduler = cls(**settings)
    scheduler.set_timesteps(steps)
    x0, eps = noise(seed=1), noise(seed=2)
    x = scheduler.add_noise(x0, eps, scheduler.timesteps[:1].repeat(2))
    for t in scheduler.timesteps:
        x = scheduler.step(eps, t, scheduler_input(scheduler, x, t)).prev_sample
    torch.testing.assert_close(x, x0, atol=2e-4, rtol=0)


def scheduler_input(scheduler, x, t):
    scheduler.scale_model_input(x, t)
    return x


@pytest.mark.parametrize(("cls", "settings"), [*ALL, *NOISY])
def test_steps_write_into_no_argument(cls, settings):
    scheduler = cls(**settings)
    scheduler.set_timesteps(6)
    x, arguments = noise(), []
    for i, t in enumerate(scheduler.timesteps):
        output = noise(seed=i)
        arguments += [(x, x.clone()), (output, output.clone())]
        scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x).prev_sample
    assert all(torch.equal(now, before) for now, before in arguments)


@pytest.mark.parametrize("copies", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize(("cls", "settings"), [*ALL, *NOISY])
def test_a_copy_in_the_middle_of_a_run_is_independent(cls, settings, copies):
    scheduler, x = cls(**settings), noise()
    scheduler.set_timesteps(7)
    early, late = scheduler.timesteps[:3], scheduler.timesteps[3:]
    x = run(scheduler, x, early)
    twin = copies(scheduler)
    expected = run(twin, x, late)
    assert torch.equal(run(scheduler, x, late), expected)
    twin.set_timesteps(4)
    assert scheduler.num_inference_steps == 7
    assert len(scheduler.timesteps) > 5


@pytest.mark.parametrize(("cls", "settings"), [*ALL, *NOISY])
def test_a_second_run_equals_the_first(cls, settings):
    scheduler = cls(**settings)
    scheduler.set_timesteps(5)
    first = run(scheduler, noise())
    scheduler.set_timesteps(8)
    run(scheduler, noise(), scheduler.timesteps[:2])  # stopped in the middle
    with pytest.raises(InputError):
        scheduler.set_timesteps(0)
    assert scheduler.num_inference_steps == 8
    scheduler.set_timesteps(np.int64(5))
    assert torch.equal(run(scheduler, noise()), first)


@pytest.mark.parametrize(("cls", "settings"), [*ALL, *NOISY])
def test_a_timestep_may_be_a_tensor_or_a_number(cls, settings):
    scheduler, ends = cls(**settings), []
    for kind in (lambda t: t, lambda t: t.item(), float, lambda t: t[None], lambda t: t.double()):
        scheduler.set_timesteps(5)
        ends.append(run(scheduler, noise(), [kind(t) for t in scheduler.timesteps]))
    assert all(torch.equal(end, ends[0]) for end in ends)


@pytest.mark.parametrize(("cls", "settings"), [*ALL, *NOISY])
def test_a_step_as_a_tuple(cls, settings):
    scheduler = cls(**settings)
    scheduler.set_timesteps(5)
    t, twin = scheduler.timesteps[0], copy.copy(scheduler)
    scheduler.scale_model_input(noise(), t)
    twin.scale_model_input(noise(), t)
    torch.manual_seed(0)
    result = scheduler.step(noise(seed=1), t, noise())
    torch.manual_seed(0)
    as_tuple = twin.step(noise(seed=1), t, noise(), return_dict=False)
    has_x0 = cls not in (PNDMScheduler, DPMSolverMultistepScheduler)
    assert len(as_tuple) == len(result.to_tuple()) == 1 + has_x0
    assert all(torch.equal(a, b) for a, b in zip(as_tuple, result.to_tuple(), strict=True))


def test_pndm_timesteps():
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [801, 601, 601, 401, 201, 1]
    scheduler = PNDMScheduler()
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [800, 700, 700, 600, 600, 500, 500, 400, 400, 300, 300, 200, 200, 0]
    assert (len(scheduler.prk_timesteps), len(scheduler.plms_timesteps)) == (12, 2)


@pytest.mark.parametrize("steps", [61, 103, 121])
@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (DDIMScheduler, {}),
        (PNDMScheduler, {"skip_prk_steps": True}),
        (LMSDiscreteScheduler, {}),
        (EulerDiscreteScheduler, {}),
        (DPMSolverMultistepScheduler, {}),
        (DDPMScheduler, {}),
    ],
)
def test_trailing_spacing_has_the_given_number_of_steps(cls, settings, steps):
    """Also where the rounding of 1000 / steps would add a timestep -1."""
    scheduler = cls(timestep_spacing="trailing", **settings)
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps.unique()) == steps
    assert scheduler.timesteps.min() > 0


@pytest.mark.parametrize("cls", SIGMA_SPACE)
def test_a_warning_when_the_input_was_never_scaled(cls):
    scheduler = cls()
    scheduler.set_timesteps(3)
    with pytest.warns(UserWarning, match="scale_model_input"):
        scheduler.step(noise(), scheduler.timesteps[0], noise())
    scheduler.scale_model_input(noise(), scheduler.timesteps[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step(noise(), scheduler.timesteps[1], noise())


def test_noise_is_drawn_from_one_generator_or_one_per_row():
    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    rows = randn((2, 3), [seeded(1), seeded(2)])
    assert torch.equal(rows, torch.cat([randn((1, 3), seeded(1)), randn((1, 3), seeded(2))]))
    assert torch.equal(randn((2, 3), [seeded(1)]), randn((2, 3), seeded(1)))
    half = randn((2, 3), seeded(1), dtype=torch.float16)
    assert torch.equal(half, torch.randn(2, 3, generator=seeded(1), dtype=torch.float16))


# Invalid arguments


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("steps", "error"),
    [
        (0, InputError),
        (-4, InputError),
        (1001, InputError),
        (2.5, InputTypeError),
        (5.0, InputTypeError),
        ("3", InputTypeError),
        (True, InputTypeError),
        (None, InputTypeError),
        ([5], InputTypeError),
    ],
)
def test_bad_numbers_of_steps(cls, steps, error):
    scheduler = cls()
    before = scheduler.timesteps
    with pytest.raises(error, match="num_inference_steps: expected an integer from 1 to 1000, got"):
        scheduler.set_timesteps(steps)
    assert scheduler.timesteps is before


@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler, PNDMScheduler])
def test_an_offset_past_the_last_training_timestep(cls):
    scheduler = cls(timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(500)
    with pytest.raises(InputError, match=r"num_inference_steps: .* first timestep is 1000 with steps_offset=1"):
        scheduler.set_timesteps(1000)
    assert scheduler.num_inference_steps == 500


def test_too_few_steps_for_runge_kutta():
    with pytest.raises(InputError, match="num_inference_steps: expected 4 or more, got 3; or pass skip_prk_steps=True"):
        PNDMScheduler().set_timesteps(3)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_train_timesteps": 0}, InputError, "num_train_timesteps: expected .*, got 0"),
        ({"num_train_timesteps": -5}, InputError, "num_train_timesteps: expected .*, got -5"),
        ({"num_train_timesteps": "1000"}, InputTypeError, "num_train_timesteps: expected .*, got '1000'"),
        ({"beta_start": float("nan")}, InputError, "beta_start: expected .*, got nan"),
        ({"beta_start": -0.1}, InputError, "beta_start: expected .*, got -0.1"),
        ({"beta_end": 1.5}, InputError, "beta_end: expected a number from 0 to 1, got 1.5"),
        ({"beta_end": "0.02"}, InputTypeError, "beta_end: expected .*, got '0.02'"),
        ({"beta_schedule": "cosine"}, InputError, "beta_schedule: expected .*squaredcos_cap_v2.*, got 'cosine'"),
        ({"timestep_spacing": "even"}, InputError, "timestep_spacing: expected .*, got 'even'"),
        ({"prediction_type": "eps"}, InputError, "prediction_type: expected .*, got 'eps'"),
        ({"steps_offset": -1}, InputError, "steps_offset: expected .*, got -1"),
        ({"trained_betas": []}, InputError, "trained_betas"),
        ({"trained_betas": [0.1, float("nan")], "num_train_timesteps": 2}, InputError, "trained_betas"),
        (
            {"trained_betas": [0.1, 1.1], "num_train_timesteps": 2},
            InputError,
            "trained_betas: expected numbers from 0 to 1, got 0.1 to 1.1",
        ),
        ({"trained_betas": [0.1, 0.2], "num_train_timesteps": 3}, InputError, "trained_betas.*num_train_timesteps"),
        ({"trained_betas": ["a"]}, InputTypeError, "trained_betas"),
        ({"beta_begin": 0.1}, TypeError, "beta_begin"),
    ],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_bad_settings(cls, settings, error, message):
    with pytest.raises(error, match=message):
        cls(**settings)


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (DDIMScheduler, {"clip_sample": "false"}, "clip_sample: expected .*, got 'false'"),
        (DDIMScheduler, {"clip_sample_range": -1.0}, "clip_sample_range: expected .*, got -1.0"),
        (DDIMScheduler, {"dynamic_thresholding_ratio": 99.5}, "dynamic_thresholding_ratio: expected .*, got 99.5"),
        (DDIMScheduler, {"sample_max_value": float("nan")}, "sample_max_value: expected .*, got nan"),
        (PNDMScheduler, {"prediction_type": "sample"}, "prediction_type: expected .*, got 'sample'"),
        (
            LMSDiscreteScheduler,
            {"use_karras_sigmas": True, "use_beta_sigmas": True},
            "expected at most one to be True, got 2",
        ),
        (LMSDiscreteScheduler, {"trained_betas": [0.0, 0.1], "num_train_timesteps": 2}, "got noise levels from 0 "),
        (
            LMSDiscreteScheduler,
            {"trained_betas": [0.1, 1.0], "num_train_timesteps": 2},
            "got noise levels from .* to inf",
        ),
    ],
)
def test_bad_settings_of_one_class(cls, settings, message):
    with pytest.raises(InputError, match=message):
        cls(**settings)


def test_a_bad_setting_in_a_file_names_the_file(tmp_path):
    (tmp_path / "scheduler_config.json").write_text('{"num_train_timesteps": 0}')
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json.*num_train_timesteps: expected .*, got 0"):
        DDIMScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "step",
    [
        DDIMScheduler().step,
        PNDMScheduler().step,
        PNDMScheduler(skip_prk_steps=True).step,
        PNDMScheduler().step_prk,
        PNDMScheduler().step_plms,
    ],
)
def test_a_step_before_set_timesteps(step):
    with pytest.raises(InputError, match="set_timesteps"):
        step(noise(), 10, noise())


@pytest.mark.parametrize(
    ("timestep", "error"),
    [
        (-1, InputError),
        (1000, InputError),
        (3.5, InputTypeError),
        (None, InputTypeError),
        ("10", InputTypeError),
        (torch.tensor([1, 2]), InputTypeError),
        (True, InputTypeError),
        (float("nan"), InputTypeError),
    ],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_bad_timesteps(cls, timestep, error):
    scheduler = cls()
    scheduler.set_timesteps(10)
    if hasattr(scheduler, "sigmas"):  # fractions are valid, if they are in `timesteps`
        error = InputError
        scheduler.scale_model_input(noise(), scheduler.timesteps[0])
        scheduler.set_timesteps(10)
    with pytest.raises(error, match="timestep: expected"):
        scheduler.step(noise(), timestep, noise())


@pytest.mark.parametrize("which", [(4, 1, 0), (0, 1, 0), (2, 1, 2), (2, 1, -1)])
def test_lms_coefficients_out_of_range(which):
    with pytest.raises(InputError, match=r"order: expected .*, got"):
        LMSDiscreteScheduler().get_lms_coefficient(*which)


def test_lms_after_the_last_step():
    scheduler = LMSDiscreteScheduler()
    scheduler.set_timesteps(2)
    run(scheduler, noise())
    with pytest.raises(InputError, match="timestep: expected at most 2 steps a run"):
        scheduler.scale_model_input(noise(), scheduler.timesteps[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eta": 2}, InputError, "eta: expected a number from 0 to 1, got 2"),
        ({"eta": -0.1}, InputError, "eta: expected .*, got -0.1"),
        ({"eta": float("nan")}, InputError, "eta: expected .*, got nan"),
        ({"eta": "1"}, InputTypeError, "eta: expected .*, got '1'"),
        ({"eta": None}, InputTypeError, "eta: expected .*, got None"),
        (
            {"eta": 1, "generator": 42},
            InputTypeError,
            r"generator: expected .*, got 42; use torch.Generator\(\).manual_seed\(42\)",
        ),
        (
            {"eta": 1, "generator": [torch.Generator()] * 3},
            InputError,
            "generator: expected one generator, or 2 for a batch of 2, got 3",
        ),
        ({"eta": 1, "generator": []}, InputError, "generator: expected one generator, or 2 for a batch of 2, got 0"),
        (
            {"eta": 1, "generator": torch.Generator(), "variance_noise": noise()},
            InputError,
            "variance_noise, generator: expected one of them, got both",
        ),
    ],
)
def test_bad_options_of_a_ddim_step(options, error, message):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(error, match=message):
        scheduler.step(noise(), 900, noise(), **options)


def test_no_signal_to_divide_by():
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    scheduler = DDIMScheduler(**settings)
    scheduler.set_timesteps(10)
    with pytest.raises(
        InputError, match=r"timestep: expected a timestep with some signal, .* got 999, .*'v_prediction'"
    ):
        scheduler.step(noise(), 999, noise())
    scheduler = DDIMScheduler(**settings, prediction_type="v_prediction")
    scheduler.set_timesteps(10)
    assert run(scheduler, noise()).isfinite().all()


def test_pndm_steps_out_of_order():
    scheduler = PNDMScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(InputError, match="step_plms: expected 12 calls of step_prk first, got 0"):
        scheduler.step_plms(noise(), 900, noise())
    scheduler = PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(10)
    with pytest.raises(InputError, match="step_prk: expected at most 0 calls a run, got one more; call step_plms"):
        scheduler.step_prk(noise(), 900, noise())


@pytest.mark.parametrize("cls", CLASSES)
def test_noise_at_timesteps_out_of_range(cls):
    scheduler = cls()
    for timesteps in ([1000, 3], [-1, 3]):
        with pytest.raises(InputError, match="timestep"):
            scheduler.add_noise(noise(), noise(), torch.tensor(timesteps))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_timesteps_of_any_integer_dtype(kind, shape):
    x = torch.randn(1, 4, 8, 8)
    t = torch.full(shape, 3)
    for method in DDIMScheduler().add_noise, PNDMScheduler().add_noise, DDIMScheduler().get_velocity:
        assert torch.equal(method(x, 2 * x, t.to(kind)), method(x, 2 * x, t))
