"""Usages of public programs, each in its smallest form, with imvar beside diffusers on one tiny checkpoint."""

import copy
import json
import pickle
import warnings

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.configuration_utils import FrozenDict
from diffusers.training_utils import EMAModel

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


# Loading: keywords that callers still pass

ACCEPTED = {
    "use_auth_token": False,
    "resume_download": True,
    "force_download": True,  # without effect on a folder
    "trust_remote_code": True,
    "mirror": "tuna",
    "offload_state_dict": True,
    "custom_pipeline": None,
    "device_map": None,
    "proxies": None,
    "low_cpu_mem_usage": False,
}


@pytest.mark.parametrize("option", ACCEPTED)
def test_keywords_of_from_pretrained(ref_folder, option):
    given = {option: ACCEPTED[option]}
    for library in imvar, diffusers:
        pipe = library.StableDiffusionImageVariationPipeline.from_pretrained(ref_folder, **given)
        assert pipe.unet.config.sample_size == 16
        unet = library.UNet2DConditionModel.from_pretrained(ref_folder, subfolder="unet", **given)
        assert unet.conv_in.weight.shape == pipe.unet.conv_in.weight.shape
        library.PNDMScheduler.from_pretrained(ref_folder, subfolder="scheduler", **given)
    if option not in ("use_auth_token", "resume_download", "custom_pipeline"):  # an error of transformers' models
        transformers.CLIPVisionModelWithProjection.from_pretrained(ref_folder, subfolder="image_encoder", **given)
    imvar.CLIPVisionModelWithProjection.from_pretrained(ref_folder, subfolder="image_encoder", **given)
    imvar.CLIPImageProcessor.from_pretrained(ref_folder, subfolder="feature_extractor", **given)


@pytest.mark.parametrize("part", ["unet", "vae", "image_encoder"])
def test_loading_info(ours, ref, ref_folder, part):
    infos = []
    for pipe in ours, ref:
        model, info = type(getattr(pipe, part)).from_pretrained(ref_folder, subfolder=part, output_loading_info=True)
        assert not model.training
        infos.append(info)
    assert infos[0] == infos[1]


# Configs as files


@pytest.mark.parametrize(
    ("name", "part"),
    [("UNet2DConditionModel", "unet"), ("AutoencoderKL", "vae"), ("PNDMScheduler", "scheduler")],
)
def test_configs_are_loaded_and_saved_alone(ref_folder, tmp_path, name, part):
    contents, made = [], []
    for library in imvar, diffusers:
        kind = getattr(library, name)
        contents.append(kind.load_config(ref_folder, subfolder=part))
        assert type(contents[-1]) is dict
        assert kind.load_config(str(ref_folder / part)) == contents[-1]
        assert kind.load_config(str(ref_folder / part / kind.config_name)) == contents[-1]
        same, unused = kind.load_config(ref_folder, subfolder=part, return_unused_kwargs=True, decay=0.5, revision=None)
        assert (same, unused) == (contents[-1], {"decay": 0.5})
        component, unused = kind.from_config(contents[-1] | {"decay": 0.5}, return_unused_kwargs=True, power=2)
        assert (unused["decay"], unused["power"], unused["_class_name"]) == (0.5, 2, name)
        component.save_config(tmp_path / library.__name__)
        text = (tmp_path / library.__name__ / kind.config_name).read_text()
        assert text == component.to_json_string()
        component.to_json_file(tmp_path / "copy.json")
        assert (tmp_path / "copy.json").read_text() == text
        assert [path.name for path in (tmp_path / library.__name__).iterdir()] == [kind.config_name]
        made.append(kind.from_config(str(tmp_path / library.__name__)))
        assert made[-1].config["_diffusers_version"] == "0.42.1"
    assert contents[0] == contents[1]
    assert saved_config(made[0]) == saved_config(made[1])
    with pytest.raises(imvar.CheckpointError, match=r"nowhere: expected a folder"):
        getattr(imvar, name).from_config(str(tmp_path / "nowhere"))
    with pytest.raises(TypeError, match=r"load_config: .* unknown argument 'decay'"):
        getattr(imvar, name).load_config(ref_folder, subfolder=part, decay=0.5)


def saved_config(component):
    return {key: value for key, value in json.loads(component.to_json_string()).items() if key != "decay"}


def test_unused_settings_of_from_pretrained(ref_folder):
    unused = []
    for library in imvar, diffusers:
        given = {"subfolder": "scheduler", "return_unused_kwargs": True, "steps_offset": 3, "power": 2}
        scheduler, rest = library.PNDMScheduler.from_pretrained(ref_folder, **given)
        assert scheduler.config.steps_offset == 3
        unused.append(rest)
    assert unused[0] == unused[1]


def test_an_index_is_loaded_and_saved_alone(ours, ref, ref_folder, tmp_path):
    for pipe in ours, ref:
        index = type(pipe).load_config(ref_folder)
        assert (type(index), index["unet"]) == (dict, ["diffusers", "UNet2DConditionModel"])
        pipe.save_config(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [pipe.config_name] == ["model_index.json"]


def test_a_moving_average_is_saved_and_resumed(ours, ref, tmp_path):
    """The hooks of training scripts with --use_ema."""
    resumed = []
    for pipe, kind in (ours, imvar.UNet2DConditionModel), (ref, diffusers.UNet2DConditionModel):
        ema = EMAModel(pipe.unet.parameters(), decay=0.9, model_cls=kind, model_config=pipe.unet.config)
        for step in range(3):
            pipe.unet.conv_in.bias.data += step + 1.0
            ema.step(pipe.unet.parameters())
        folder = tmp_path / kind.__module__.split(".")[0]
        ema.save_pretrained(folder)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no config fields .*decay")
            loaded = EMAModel.from_pretrained(folder, kind)
        assert (loaded.decay, loaded.optimization_step) == (0.9, 3)
        loaded.copy_to(pipe.unet.parameters())
        resumed.append(pipe.unet)
    for name, parameter in resumed[0].state_dict().items():
        assert torch.equal(parameter, resumed[1].state_dict()[name]), name


# Attributes


def test_settings_are_attributes(ours, ref):
    """Of pipelines that were copied before 0.17, and of training scripts."""
    for pipe in ours, ref:
        assert (pipe.unet.in_channels, pipe.unet.sample_size, pipe.vae.latent_channels) == (4, 16, 4)
        assert (pipe.scheduler.num_train_timesteps, pipe.scheduler.prediction_type) == (1000, "epsilon")
        for component in pipe.unet, pipe.scheduler, pipe.image_encoder:
            assert not hasattr(component, "clip_skip")
            assert not hasattr(component, "__len_hint__")
        assert not hasattr(pipe.image_encoder, "hidden_size")
        for copied in copy.copy(pipe.unet), copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet)):
            assert copied.in_channels == 4
        pipe.scheduler.register_to_config(num_train_timesteps=900)
        assert copy.deepcopy(pipe.scheduler).num_train_timesteps == 900
    with pytest.raises(AttributeError, match="UNet2DConditionModel has no attribute or config field 'widths'"):
        _ = ours.unet.widths


def test_names_of_diffusers(ours, ref, ref_folder):
    for name in ("_optional_components", "model_cpu_offload_seq", "config_name", "has_compatibles", "name_or_path"):
        assert getattr(ours, name) == getattr(ref, name), name
    assert ours.config["_name_or_path"] == ref.config["_name_or_path"] == ref_folder
    assert type(ours)(**ours.components).name_or_path is type(ref)(**ref.components).name_or_path is None
    for part in ("unet", "vae", "scheduler"):
        for name in ("config_name", "has_compatibles"):
            assert getattr(getattr(ours, part), name) == getattr(getattr(ref, part), name), name
    kinds = ours.scheduler.compatibles
    assert {kind.__name__ for kind in kinds} == set(ours.scheduler._compatibles) <= set(ref.scheduler._compatibles)
    for kind in kinds:
        assert kind.from_config(ours.scheduler.config).config.beta_start == ours.scheduler.config.beta_start


# Methods


def test_fused_projections(ours, ref, photo):
    before = call(ours, photo)
    for pipe in ours, ref:
        pipe.fuse_qkv_projections()
        pipe.unet.fuse_qkv_projections()
        pipe.vae.fuse_qkv_projections()
    assert_equal(call(ours, photo), call(ref, photo))
    for pipe in ours, ref:
        pipe.unfuse_qkv_projections()
    assert np.array_equal(call(ours, photo), before)


def test_attention_processors_are_missing_with_a_hint(ours):
    for model in ours.unet, ours.vae:
        assert not hasattr(model, "attn_processors")
        assert not hasattr(model, "set_attn_processor")
        with pytest.raises(
            AttributeError, match=r"attn_processors: .* set_attend replaces kernels, and replace_layers"
        ):
            _ = model.attn_processors
        with pytest.raises(AttributeError, match=r"set_attn_processor: .*set_attend"):
            model.set_attn_processor({})


def test_the_default_attention(ours, ref, photo):
    before = call(ours, photo)
    ours.enable_xformers_memory_efficient_attention(lambda q, k, v: torch.zeros_like(q))
    assert not np.array_equal(call(ours, photo), before)
    for model in ours.unet, ours.vae, ref.unet, ref.vae:
        model.set_default_attn_processor()
    assert_equal(call(ours, photo), call(ref, photo))
    assert np.array_equal(call(ours, photo), before)


@pytest.mark.parametrize("size", [32, 64, 96, 200])
def test_tiled_encoding_and_decoding(ours, ref, size):
    """Asked for directly, tiles are made of images of any size."""
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        encoded = [pipe.vae.tiled_encode(images).latent_dist.mode() for pipe in (ours, ref)]
        decoded = [pipe.vae.tiled_decode(encoded[1], return_dict=False)[0] for pipe in (ours, ref)]
        assert_equal(*encoded)
        assert_equal(*(images / 2 for images in decoded))
        assert_equal(ours.vae.tiled_encode(images, return_dict=False)[0].mean, encoded[1])
        assert torch.equal(ours.vae.tiled_decode(encoded[1]).sample, decoded[0])


def test_the_older_names_of_device_and_dtype(ours):
    assert ours.to(torch_device="cpu", torch_dtype=torch.float16).dtype is torch.float16
    with pytest.raises(InputError, match="device: expected one value, got"):
        ours.to("cpu", torch_device="meta")


def test_sequential_offload_is_model_offload(ours, photo):
    before = call(ours, photo)
    with pytest.warns(UserWarning, match="enable_sequential_cpu_offload: .* enable_model_cpu_offload"):
        ours.enable_sequential_cpu_offload(device="cpu")
    assert ours._offload is not None
    assert np.array_equal(call(ours, photo), before)
