"""The schedulers against diffusers: the same configs and the same model outputs."""

from __future__ import annotations

import inspect
import json
from itertools import product

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

import imvar.schedulers
from imvar.schedulers.timesteps import beta_quantile

NAMES = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
]
SIGMA_SPACINGS = ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]
SPACINGS = ["leading", "linspace", "trailing"]
SHAPE = (2, 4, 3, 3)
# diffusers' LMS calls scipy's adaptive quadrature on float32 tensors; the others agree to the last bit
TOLERANCE = dict.fromkeys(NAMES, 0.0) | {"LMSDiscreteScheduler": 1e-6}

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pair(name: str, **settings):
    return getattr(imvar.schedulers, name)(**settings), getattr(diffusers, name)(**settings)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def difference(our: Tensor, ref: Tensor) -> float:
    assert our.dtype == ref.dtype
    assert our.shape == ref.shape
    assert ref.isfinite().all()
    return ((our - ref).abs().max() / ref.abs().max()).item()


def compare_runs(
    name: str, steps: int, settings: dict, *, dtype=torch.float32, eta: float | None = None, **options
) -> None:
    """Run both schedulers; every output of every step must agree."""
    our, ref = pair(name, **settings)
    our.set_timesteps(steps)
    ref.set_timesteps(steps)
    assert our.timesteps.dtype == ref.timesteps.dtype
    assert our.timesteps.tolist() == ref.timesteps.tolist()
    if steps > 1 and hasattr(ref, "set_begin_index") and ref.timesteps[0] == ref.timesteps[1]:
        ref.set_begin_index(0)  # else it starts at the second of them and runs out of steps
    if hasattr(ref, "sigmas"):
        assert torch.equal(our.sigmas, ref.sigmas)
    assert our.num_inference_steps == ref.num_inference_steps
    assert torch.equal(torch.as_tensor(our.init_noise_sigma), torch.as_tensor(ref.init_noise_sigma))

    network = torch.Generator().manual_seed(0)
    our_x = ref_x = torch.randn(SHAPE, generator=network).to(dtype) * ref.init_noise_sigma
    our_options, ref_options = dict(options), dict(options)
    if "generator" in inspect.signature(ref.step).parameters:
        our_options["generator"], ref_options["generator"] = seeded(1), seeded(1)
    if eta is not None:
        our_options["eta"] = ref_options["eta"] = eta
    for t in ref.timesteps:
        eps = torch.randn(SHAPE, generator=network).to(dtype)
        our_out = eps + 0.1 * our.scale_model_input(our_x, t)  # a model output that depends on its input
        ref_out = eps + 0.1 * ref.scale_model_input(ref_x, t)
        our_step, ref_step = our.step(our_out, t, our_x, **our_options), ref.step(ref_out, t, ref_x, **ref_options)
        assert our_step.keys() == ref_step.keys()
        for key in ref_step:
            assert difference(our_step[key], ref_step[key]) <= TOLERANCE[name], (t, key)
        our_x, ref_x = our_step.prev_sample, ref_step.prev_sample


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 10, 20, 50])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        *product(NAMES, ["epsilon", "v_prediction"]),
        *product([n for n in NAMES if n not in ("PNDMScheduler", "EulerAncestralDiscreteScheduler")], ["sample"]),
    ],
)
def test_a_run(name, spacing, prediction, steps):
    settings = {"timestep_spacing": spacing, "prediction_type": prediction, "beta_schedule": "scaled_linear"}
    if name == "PNDMScheduler":
        compare_runs(name, steps, settings | {"skip_prk_steps": True})
    if name != "PNDMScheduler" or steps >= 4:  # three Runge-Kutta steps and one more
        compare_runs(name, steps, settings)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 14, 15, 50])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sigmas", SIGMA_SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_run_over_spaced_sigmas(name, prediction, sigmas, spacing, steps):
    settings = {"timestep_spacing": spacing, "prediction_type": prediction, "beta_schedule": "scaled_linear"}
    compare_runs(name, steps, settings | {sigmas: True})


@pytest.mark.parametrize(
    ("name", "steps", "settings"),
    [
        ("DDPMScheduler", 1000, {}),
        ("DPMSolverMultistepScheduler", 999, {"timestep_spacing": "leading"}),
        ("DPMSolverMultistepScheduler", 999, {}),
        ("EulerDiscreteScheduler", 1000, {"use_karras_sigmas": True}),
        ("EulerAncestralDiscreteScheduler", 999, {}),
        ("DDIMScheduler", 999, {}),
        ("DDIMScheduler", 1000, {"timestep_spacing": "trailing"}),
        ("PNDMScheduler", 999, {"timestep_spacing": "linspace"}),
        ("PNDMScheduler", 1000, {"skip_prk_steps": True}),
        ("LMSDiscreteScheduler", 100, {"timestep_spacing": "leading", "steps_offset": 1}),
    ],
)
def test_a_long_run(name, steps, settings):
    compare_runs(name, steps, settings)


OPTIONS = [
    *product(
        ["DDIMScheduler"],
        [
            {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False},
            {"clip_sample_range": 0.3},
            {"thresholding": True},
            {"thresholding": True, "sample_max_value": 3.0, "dynamic_thresholding_ratio": 0.7},
            {"rescale_betas_zero_snr": True},
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        ],
    ),
    *product(
        ["PNDMScheduler"],
        [
            {"skip_prk_steps": True, "steps_offset": 1},  # as published
            {"skip_prk_steps": True, "set_alpha_to_one": True, "steps_offset": 1},
            {"set_alpha_to_one": True, "steps_offset": 1, "prediction_type": "v_prediction"},
        ],
    ),
    *product(
        ["LMSDiscreteScheduler"],
        [
            {"use_karras_sigmas": True},
            {"use_exponential_sigmas": True},
            {"use_beta_sigmas": True},
            {"use_beta_sigmas": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
            {"use_karras_sigmas": True, "timestep_spacing": "leading", "steps_offset": 1},
        ],
    ),
    *product(
        ["DDPMScheduler"],
        [
            {"variance_type": "fixed_small_log"},
            {"variance_type": "fixed_large", "steps_offset": 1, "clip_sample": False},
            {"clip_sample_range": 0.3},
            {"thresholding": True, "sample_max_value": 3.0, "dynamic_thresholding_ratio": 0.7},
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        ],
    ),
    *product(
        ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"],
        [
            {"final_sigmas_type": "sigma_min"},
            {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
        ],
    ),
    *product(
        ["EulerDiscreteScheduler"],
        [{name: True, "sigma_min": 0.1, "sigma_max": 9.0} for name in SIGMA_SPACINGS],
    ),
    *product(
        ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"],
        [
            {"rescale_betas_zero_snr": True},
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
            {"timestep_spacing": "leading", "steps_offset": 1},
        ],
    ),
    *product(
        ["DPMSolverMultistepScheduler"],
        [
            {"solver_order": 1},
            {"solver_type": "heun"},
            {"solver_type": "bh2"},
            {"algorithm_type": "deis", "final_sigmas_type": "sigma_min"},
            {"lower_order_final": False},
            {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
            {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
            {"thresholding": True, "sample_max_value": 3.0},
            {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
            {"algorithm_type": "sde-dpmsolver++"},
            {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "use_karras_sigmas": True},
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 1, "prediction_type": "v_prediction"},
        ],
    ),
    *product(
        NAMES,
        [
            {"beta_schedule": "linear"},
            {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"},
            {"trained_betas": list(np.linspace(0.001, 0.03, 200)), "num_train_timesteps": 200},
            {
                "trained_betas": np.linspace(0.001, 0.03, 200),
                "num_train_timesteps": 200,
                "timestep_spacing": "linspace",
            },
            {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        ],
    ),
]


@pytest.mark.parametrize("steps", [7, 25])
@pytest.mark.parametrize(("name", "settings"), OPTIONS)
def test_an_option(name, settings, steps):
    compare_runs(name, steps, settings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDIMScheduler", {}),
        ("DDIMScheduler", {"thresholding": True, "prediction_type": "v_prediction"}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("PNDMScheduler", {}),
        ("LMSDiscreteScheduler", {}),
        ("DDPMScheduler", {}),
        ("DDPMScheduler", {"variance_type": "fixed_small_log", "prediction_type": "v_prediction"}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction", "algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_other_dtypes(name, settings, dtype):
    compare_runs(name, 10, settings, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1])
def test_ddim_noise(eta, clipped, dtype):
    compare_runs("DDIMScheduler", 8, {}, dtype=dtype, eta=eta, use_clipped_model_output=clipped)


def test_ddim_noise_by_one_generator_per_row_and_by_variance_noise():
    our, ref = pair("DDIMScheduler")
    our.set_timesteps(5)
    ref.set_timesteps(5)
    x, out, noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))

    for seeds in [(1,), (1, 2)]:
        got, want = (
            side.step(out, 600, x, eta=0.5, generator=list(map(seeded, seeds))).prev_sample for side in (our, ref)
        )
        assert torch.equal(got, want)
    got = our.step(out, 600, x, eta=0.5, variance_noise=noise).prev_sample
    assert torch.equal(got, ref.step(out, 600, x, eta=0.5, variance_noise=noise).prev_sample)
    torch.manual_seed(3)
    got = our.step(out, 600, x, eta=0.5).prev_sample  # no generator: the global one
    torch.manual_seed(3)
    assert torch.equal(got, ref.step(out, 600, x, eta=0.5).prev_sample)


NOISY = {
    "DDPMScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
}


@pytest.mark.parametrize("seeds", [(1,), (1, 2), None])
@pytest.mark.parametrize("name", NOISY)
def test_noise_by_one_generator_or_one_per_row(name, seeds):
    x, out = torch.randn(2, *SHAPE, generator=seeded(0))
    results = []
    for side in pair(name, **NOISY[name]):
        side.set_timesteps(5)
        side.scale_model_input(x, side.timesteps[0])
        torch.manual_seed(3)  # of the global generator, without another
        results.append(side.step(out, side.timesteps[0], x, seeds and list(map(seeded, seeds))).prev_sample)
    assert torch.equal(*results)


def test_the_noise_of_the_sde_as_an_argument():
    x, out, noise = torch.randn(3, *SHAPE, generator=seeded(0))
    results = []
    for side in pair("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"):
        side.set_timesteps(5)
        results.append(side.step(out, side.timesteps[0], x, variance_noise=noise).prev_sample)
    assert torch.equal(*results)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "options", [{"s_churn": 2.0}, {"s_churn": 100, "s_noise": 1.1}, {"s_churn": 2.0, "s_tmin": 0.5, "s_tmax": 20.0}]
)
def test_churn_of_euler(options, prediction):
    compare_runs("EulerDiscreteScheduler", 9, {"prediction_type": prediction}, **options)


SCHEDULES = [
    ("DDPMScheduler", {}, {"timesteps": [999, 850, 645, 233, 24]}),
    ("DPMSolverMultistepScheduler", {}, {"timesteps": [999, 850, 645, 233, 24]}),
    ("EulerDiscreteScheduler", {}, {"timesteps": [999, 850.5, 645, 233, 24]}),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, {"timesteps": [999, 850, 645, 233, 24]}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"sigmas": [14.615, 3.861, 1.396, 0.399, 0.0]}),
]


@pytest.mark.parametrize(("name", "settings", "schedule"), SCHEDULES)
def test_a_schedule_of_ones_own(name, settings, schedule):
    our, ref = pair(name, **settings)
    our.set_timesteps(**schedule)
    ref.set_timesteps(**schedule)
    assert our.timesteps.dtype == ref.timesteps.dtype
    assert torch.equal(our.timesteps, ref.timesteps)
    our_x = ref_x = torch.randn(SHAPE, generator=seeded(0)) * ref.init_noise_sigma
    for t in ref.timesteps:
        our_out, ref_out = our.scale_model_input(our_x, t).sin(), ref.scale_model_input(ref_x, t).sin()
        our_x = our.step(our_out, t, our_x, generator=seeded(1)).prev_sample
        ref_x = ref.step(ref_out, t, ref_x, generator=seeded(1)).prev_sample
        assert torch.equal(our_x, ref_x)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_lms_order(order):
    compare_runs("LMSDiscreteScheduler", 10, {}, order=order)


@pytest.mark.parametrize("settings", [{}, {"use_karras_sigmas": True}, {"use_beta_sigmas": True}])
def test_lms_tables_and_coefficients(settings):
    our, ref = pair("LMSDiscreteScheduler", **settings)
    for steps in [None, 1, 2, 7, 50, 1000]:
        if steps:
            our.set_timesteps(steps)
            ref.set_timesteps(steps)
        assert torch.equal(our.timesteps, ref.timesteps)
        assert torch.equal(our.sigmas, ref.sigmas)
    our.set_timesteps(12)
    ref.set_timesteps(12)
    for order in range(1, 5):
        for back in range(order):
            want = ref.get_lms_coefficient(order, 6, back)
            assert our.get_lms_coefficient(order, 6, back) == pytest.approx(want, rel=1e-7)


@pytest.mark.parametrize("name", ["LMSDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("spacing", SIGMA_SPACINGS)
def test_the_sigma_bounds_of_an_euler_config(spacing, name):
    euler = {"sigma_min": 0.1, "sigma_max": 9.0, spacing: True}
    our, ref = (getattr(side, name).from_config(euler) for side in (imvar.schedulers, diffusers))
    our.set_timesteps(6)
    ref.set_timesteps(6)
    assert torch.equal(our.sigmas, ref.sigmas)
    assert torch.equal(our.timesteps, ref.timesteps)


@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(getattr(diffusers, n), "set_begin_index")])
def test_from_the_middle(name):
    our, ref = pair(name, beta_schedule="scaled_linear")
    for side in (our, ref):
        side.set_timesteps(10)
        side.set_begin_index(4)
    x, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    when = ref.timesteps[4:5].repeat(2)
    our_x, ref_x = our.add_noise(x, noise, when), ref.add_noise(x, noise, when)
    assert torch.equal(our_x, ref_x)
    for t in ref.timesteps[4:]:
        torch.manual_seed(1)
        our_x = our.step(our.scale_model_input(our_x, t), t, our_x).prev_sample
        torch.manual_seed(1)
        ref_x = ref.step(ref.scale_model_input(ref_x, t), t, ref_x).prev_sample
        assert difference(our_x, ref_x) <= TOLERANCE[name]
        assert (our.step_index, our.begin_index) == (ref.step_index, ref.begin_index)
        assert torch.equal(our.add_noise(x, noise, when), ref.add_noise(x, noise, when))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_add_noise_and_velocity(name, dtype):
    our, ref = pair(name, timestep_spacing="leading")
    x, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    when = torch.tensor([900, 3])
    if name == "DPMSolverMultistepScheduler":
        our.set_timesteps(500)
        ref.set_timesteps(500)
        when = ref.timesteps[[50, 498]]
    assert torch.equal(our.add_noise(x, noise, when), ref.add_noise(x, noise, when))
    assert hasattr(our, "get_velocity") == hasattr(ref, "get_velocity")
    if hasattr(ref, "get_velocity") and name != "EulerDiscreteScheduler":
        assert torch.equal(our.get_velocity(x, noise, when), ref.get_velocity(x, noise, when))


def test_noise_levels_that_diffusers_reads_in_the_opposite_order():
    """DPM-Solver's of training before the first run, and those of the target of Euler: here they are those of DDIM."""
    x, noise = torch.randn(2, *SHAPE, generator=seeded(0))
    when = torch.tensor([900, 3])
    ddim = imvar.DDIMScheduler()
    (dpm, _), (euler, _) = pair("DPMSolverMultistepScheduler"), pair("EulerDiscreteScheduler")
    torch.testing.assert_close(dpm.add_noise(x, noise, when), ddim.add_noise(x, noise, when))
    torch.testing.assert_close(euler.get_velocity(x, noise, when), ddim.get_velocity(x, noise, when))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_arguments(name):
    our, ref = getattr(imvar.schedulers, name), getattr(diffusers, name)

    def arguments(call) -> list:
        return [(p.name, p.default) for p in inspect.signature(call).parameters.values() if p.name != "self"]

    assert arguments(our) == arguments(ref.__init__)
    for method in (
        "step",
        "step_plms",
        "step_prk",
        "set_timesteps",
        "add_noise",
        "get_velocity",
        "get_lms_coefficient",
        "index_for_timestep",
        "set_begin_index",
    ):
        assert hasattr(our, method) == hasattr(ref, method)
        if hasattr(ref, method):
            assert arguments(getattr(our, method)) == arguments(getattr(ref, method))


def test_beta_quantile():
    p = np.linspace(0, 1, 1001)
    np.testing.assert_allclose(beta_quantile(p, 0.6), scipy.stats.beta.ppf(p, 0.6, 0.6), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("settings", [{}, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": "scaled_linear"}])
@pytest.mark.parametrize("name", NAMES)
def test_before_the_first_run(name, settings):
    our, ref = pair(name, **settings)
    assert (our.timesteps is None) == (ref.timesteps is None)
    if ref.timesteps is not None:
        assert torch.equal(our.timesteps, ref.timesteps)
    for table in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod"):
        assert hasattr(our, table) == hasattr(ref, table)
        if hasattr(ref, table):
            assert torch.equal(getattr(our, table), getattr(ref, table))
    assert our.num_inference_steps == ref.num_inference_steps
    assert (len(our), our.order, our.config_name) == (len(ref), ref.order, ref.config_name)
    assert our.init_noise_sigma == ref.init_noise_sigma


def test_zero_snr_tables():
    our, ref = pair("DDIMScheduler", rescale_betas_zero_snr=True, beta_schedule="scaled_linear")
    assert torch.equal(our.betas, ref.betas)
    assert torch.equal(our.alphas_cumprod, ref.alphas_cumprod)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_steps(name, spacing):
    """Except those where rounding adds a timestep -1 to `trailing` in diffusers, pure noise at the end."""
    our, ref = pair(name, timestep_spacing=spacing)
    n_negative = 0
    for steps in range(4, 1000, 3):
        our.set_timesteps(steps)
        ref.set_timesteps(steps)
        if ref.timesteps.min() == -1:
            n_negative += 1
            assert our.timesteps.min() >= 0
        else:
            assert our.timesteps.tolist() == ref.timesteps.tolist()
    assert (n_negative > 0) == (spacing == "trailing")


def test_pndm_refuses_prediction_type_sample():
    with pytest.raises(ValueError, match=r"prediction_type: expected .*, got 'sample'"):
        imvar.schedulers.PNDMScheduler(prediction_type="sample")


# Configs, between schedulers and on disk


def settings_of(scheduler) -> dict:
    return {k: v for k, v in dict(scheduler.config).items() if k not in ("_use_default_values", "_class_name")}


GIVEN = [
    ("DDIMScheduler", {}),
    ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1, "beta_schedule": "scaled_linear"}),
    ("PNDMScheduler", {"skip_prk_steps": True, "timestep_spacing": "trailing", "beta_end": 0.012}),
    ("LMSDiscreteScheduler", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
    ("DDIMScheduler", {"timestep_spacing": "leading", "set_alpha_to_one": True}),  # defaults, but given
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_max": 9.0, "final_sigmas_type": "sigma_min"}),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun", "solver_order": 1, "use_karras_sigmas": True}),
    ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample": False}),
]


@pytest.mark.parametrize(
    "chain",
    [
        ["PNDMScheduler", "DDIMScheduler"],
        ["LMSDiscreteScheduler", "PNDMScheduler", "DDIMScheduler"],
        ["DDIMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "LMSDiscreteScheduler"],
        ["EulerDiscreteScheduler", "DDPMScheduler"],
        ["DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"],
    ],
)
@pytest.mark.parametrize(("name", "settings"), GIVEN)
def test_configs_pass_along_a_chain_of_schedulers(name, settings, chain, tmp_path):
    our, ref = pair(name, **settings)
    for name in chain:
        mixed = getattr(imvar.schedulers, name).from_config(ref.config)  # diffusers' own FrozenDict
        our = getattr(imvar.schedulers, name).from_config(our.config)
        ref = getattr(diffusers, name).from_config(ref.config)
        assert settings_of(our) == settings_of(ref)
        assert settings_of(mixed) == settings_of(ref)
        changed = getattr(imvar.schedulers, name).from_config(our.config, num_train_timesteps=500)
        assert len(changed) == 500
    our.save_pretrained(tmp_path / "our")
    ref.save_pretrained(tmp_path / "ref")
    file = "scheduler_config.json"
    assert json.loads((tmp_path / "our" / file).read_text()) == json.loads((tmp_path / "ref" / file).read_text())


@pytest.mark.parametrize("loader", NAMES)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *GIVEN,
        ("DDIMScheduler", {"trained_betas": np.linspace(0.1, 0.2, 10), "num_train_timesteps": 10}),
    ],
)
def test_files_load_in_the_other_library(name, settings, loader, tmp_path):
    our, ref = pair(name, **settings)
    our.save_pretrained(tmp_path / "our")
    ref.save_pretrained(tmp_path / "ref" / "scheduler")
    ours_in_diffusers = getattr(diffusers, loader).from_pretrained(tmp_path / "our")
    theirs_in_imvar = getattr(imvar.schedulers, loader).from_pretrained(tmp_path / "ref", subfolder="scheduler")
    assert settings_of(ours_in_diffusers) == settings_of(theirs_in_imvar)
    assert torch.equal(ours_in_diffusers.betas, theirs_in_imvar.betas)
    assert torch.equal(theirs_in_imvar.betas, our.betas)


OTHERS = [
    "DDIMParallelScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMEulerScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "UniPCMultistepScheduler",
    *NAMES,
]


@pytest.mark.parametrize("name", OTHERS)
def test_every_scheduler_reads_the_saved_config_of_every_other(name, tmp_path):
    """A file has all fields, also those that were defaults, so they are those of the other class."""
    getattr(diffusers, name)().save_pretrained(tmp_path)
    for reader in NAMES:
        ours, theirs = (getattr(library, reader).from_pretrained(tmp_path) for library in (imvar, diffusers))
        assert settings_of(ours) == settings_of(theirs)


@pytest.mark.parametrize("name", ["PNDMScheduler", "LMSDiscreteScheduler"])
def test_a_config_field_of_ddim_alone_is_kept_and_not_applied(name):
    ours, theirs = (
        getattr(library, name).from_config(library.DDIMScheduler(rescale_betas_zero_snr=True).config)
        for library in (imvar, diffusers)
    )
    assert torch.equal(ours.betas, theirs.betas)
    assert ours.config["rescale_betas_zero_snr"] is theirs.config["rescale_betas_zero_snr"] is True


@pytest.mark.parametrize("settings", [{}, {"use_karras_sigmas": True}])
def test_lms_starts_past_the_last_training_timestep(settings):
    settings = {"timestep_spacing": "leading", "steps_offset": 1, "num_train_timesteps": 50} | settings
    ours, theirs = (library.LMSDiscreteScheduler(**settings) for library in (imvar, diffusers))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(50)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.sigmas, theirs.sigmas)
