"""Usages of public programs, each in its smallest form, with imvar beside diffusers on one tiny checkpoint."""

import copy
import pickle

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict

import imvar
from imvar import InputError
from tests.reference.conftest import ours, ref, ref_folder

__all__ = ["ours", "ref", "ref_folder"]


def call(pipe, photo, **options):
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"} | options
    return pipe(photo, generator=torch.Generator().manual_seed(5), **options).images


def assert_equal(ours, theirs):
    assert np.ptp(theirs) > 0.1
    assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() <= 1e-5


# Configs: code of the pipelines that were forked from Stable Diffusion replaces `_internal_dict`


def outdated_settings(scheduler=None, unet=None):
    """The checks that a pipeline's constructor of 2022 begins with."""
    if scheduler is not None:
        if getattr(scheduler.config, "steps_offset", 1) != 1:
            new_config = dict(scheduler.config)
            new_config["steps_offset"] = 1
            scheduler._internal_dict = FrozenDict(new_config)
        if getattr(scheduler.config, "clip_sample", False) is True:
            new_config = dict(scheduler.config)
            new_config["clip_sample"] = False
            scheduler._internal_dict = FrozenDict(new_config)
    if unet is not None and unet.config.sample_size < 64:
        new_config = dict(unet.config)
        new_config["sample_size"] = 64
        unet._internal_dict = FrozenDict(new_config)


@pytest.mark.parametrize("saved", [{}, {"clip_sample": True, "steps_offset": 0}], ids=["defaults", "in the file"])
def test_an_assigned_internal_dict_counts(ours, ref, photo, saved):
    images = []
    for pipe, library in (ours, imvar), (ref, diffusers):
        pipe.scheduler = library.DDIMScheduler(beta_schedule="scaled_linear", **saved)
        before = call(pipe, photo)
        outdated_settings(pipe.scheduler)
        images.append(call(pipe, photo))
        assert np.abs(images[-1] - before).max() > 0.01
        assert pipe.scheduler.config.clip_sample is pipe.scheduler._internal_dict["clip_sample"] is False
        pipe.scheduler.set_timesteps(4)
        assert pipe.scheduler.timesteps.tolist() == [751, 501, 251, 1]
    assert_equal(*images)


def test_an_assigned_size_counts(ours, ref):
    for pipe in ours, ref:
        outdated_settings(unet=pipe.unet)
        assert (pipe.unet.config.sample_size, pipe.unet.config["in_channels"]) == (64, 4)
    assert ours.default_size(None, None) == (512, 512)


@pytest.mark.parametrize("change", ["item", "attribute", "register"])
def test_a_setting_that_is_assigned_to_a_config_counts(ours, ref, photo, change):
    images = []
    for pipe, library in (ours, imvar), (ref, diffusers):
        pipe.scheduler = library.DDIMScheduler(beta_schedule="scaled_linear")
        config = pipe.scheduler.config
        if change == "item":
            config["prediction_type"], config["clip_sample"] = "v_prediction", False
            assert config["prediction_type"] == "v_prediction"
        elif change == "attribute":
            config.prediction_type, config.clip_sample = "v_prediction", False
            assert config.prediction_type == "v_prediction"
        else:
            pipe.scheduler.register_to_config(prediction_type="v_prediction", clip_sample=False)
        if change == "item":  # diffusers steps by the attributes, which items do not change
            pipe.scheduler._internal_dict = FrozenDict(dict(config))
        images.append(call(pipe, photo))
    assert_equal(*images)


def test_configs_that_were_shared_change_alone(ours):
    unet = ours.unet
    twin = imvar.UNet2DConditionModel(unet.config)
    shallow, deep = copy.copy(unet), copy.deepcopy(unet)
    pickled = pickle.loads(pickle.dumps(unet))
    for i, model in enumerate((unet, twin, shallow, deep, pickled)):
        model.config["sample_size"] = 20 + i
    assert [m.config.sample_size for m in (unet, twin, shallow, deep, pickled)] == [20, 21, 22, 23, 24]
    assert type(pickle.loads(pickle.dumps(unet.config))) is type(unet.config)
    assert unet.config == copy.copy(unet.config) == unet._internal_dict
    with pytest.raises(TypeError, match="register_to_config"):
        copy.copy(unet.config)["sample_size"] = 30  # of no model
    assert unet.config.sample_size == 20


def test_a_setting_that_is_assigned_to_the_config_of_a_pipeline_counts(ours, tmp_path):
    ours.config["requires_safety_checker"] = False
    ours.save_pretrained(tmp_path)
    ours.config.author = "me"
    assert (ours.config.requires_safety_checker, ours._internal_dict["author"]) == (False, "me")
    assert imvar.StableDiffusionImageVariationPipeline.from_pretrained(tmp_path).config.requires_safety_checker is False


def test_a_call_has_its_own_config(ours, photo):
    ours.scheduler = imvar.DDIMScheduler.from_config(ours.scheduler.config, clip_sample=False)

    def clip(step, timestep, latents):
        ours.scheduler.config["clip_sample"] = True

    assert not np.array_equal(call(ours, photo, callback=clip), call(ours, photo))
    assert ours.scheduler.config.clip_sample is False


def test_what_a_config_refuses_leaves_it_unchanged(ours):
    for component, name, value in (
        (ours.unet, "act_fn", "relu"),
        (ours.scheduler, "beta_start", 2.0),
        (imvar.LMSDiscreteScheduler(), "trained_betas", [0.0] * 1000),
    ):
        before, old = dict(component.config), dict(vars(component))
        for assign in (
            lambda c=component, n=name, v=value: c.config.__setitem__(n, v),
            lambda c=component, n=name, v=value: setattr(c.config, n, v),
            lambda c=component, n=name, v=value: setattr(c, "_internal_dict", {n: v}),
        ):
            with pytest.raises(InputError):
                assign()
        assert component.config == before
        assert all(vars(component)[key] is old[key] for key in old if key != "config")
    for change in (lambda c: c.update(sample_size=3), lambda c: c.setdefault("x", 3), lambda c: c.pop("sample_size")):
        with pytest.raises(TypeError, match="register_to_config"):
            change(ours.unet.config)
    with pytest.raises(TypeError, match="config: expected a config or a dictionary, got str"):
        ours.unet._internal_dict = "x"


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "LMSDiscreteScheduler"])
@pytest.mark.parametrize(
    "changes",
    [
        {"beta_start": 0.001, "beta_end": 0.03},
        {"num_train_timesteps": 500},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"set_alpha_to_one": False, "steps_offset": 1},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_tables_follow_an_assigned_config(name, changes):
    kind = getattr(imvar, name)
    changed, made = kind(skip_prk_steps=True) if name == "PNDMScheduler" else kind(), None
    x, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    changed.set_timesteps(10)
    changed._internal_dict = FrozenDict(dict(changed.config) | changes)
    made = kind.from_config(dict(changed.config))
    outputs = []
    for scheduler in changed, made:
        scheduler.set_timesteps(10)
        scheduler.scale_model_input(x, scheduler.timesteps[0])
        outputs.append((scheduler.timesteps, scheduler.betas, scheduler.step(eps, scheduler.timesteps[0], x)[0]))
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
    if name == "DDIMScheduler" or "beta" in next(iter(changes)):
        assert not torch.equal(outputs[0][2], plain_step(kind, x, eps))


def plain_step(kind, x, eps):
    scheduler = kind(skip_prk_steps=True) if kind is imvar.PNDMScheduler else kind()
    scheduler.set_timesteps(10)
    scheduler.scale_model_input(x, scheduler.timesteps[0])
    return scheduler.step(eps, scheduler.timesteps[0], x)[0]


def test_own_tables_stay_where_a_config_changes_nothing_of_them():
    scheduler = imvar.DDIMScheduler()
    scheduler.alphas_cumprod = mine = scheduler.alphas_cumprod**2
    scheduler.register_to_config(clip_sample=False, steps_offset=1)
    assert scheduler.alphas_cumprod is mine
