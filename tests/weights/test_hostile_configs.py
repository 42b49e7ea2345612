"""Configs and indexes that no model supports: refused early, with the name of the field."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import imvar
from imvar import CheckpointError, InputError, StableDiffusionImageVariationPipeline
from imvar.weights.json_files import MAX_JSON_BYTES
from tests.support.refusals import CLASSES, LFS, assert_part_refused, assert_refused, every_part, weights

# Configs


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "got an empty file"),
        (b"{", "expected valid JSON, got an error"),
        (b"[]", "expected a JSON object, got a list"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": NaN}', "got an error: NaN for a, which is not a finite number"),
        (b'{"lambda_min_clipped": Infinity}', "Infinity for lambda_min_clipped, which is not a finite number"),
        (b'{"a": -Infinity}', "got an error: -Infinity for a, which is not a finite number"),
        (b'{"a": [[1, 1e999]]}', "got an error: 1e999 for a, which is not a finite number"),
        (b'{"a": ' + b"1" * 10**5 + b"}", "expected valid JSON, got an error"),
        (b'{"a": ' * 10**5, "expected valid JSON, got an error"),
        (b'{"a": 1, "a": 1}', "the duplicate key 'a'"),
        (b" " * (MAX_JSON_BYTES + 1), "expected at most 2097152 bytes of JSON"),
        (LFS, "got a git-lfs pointer"),
        (b'{"_use_default_values": 3}', "_use_default_values: expected a list of field names, got 3"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("file", ["config.json", "model_index.json"])
@every_part
def test_json(folder, part, file, content, words):
    path = folder / part / file if file == "config.json" else folder / file
    path.write_bytes(content)
    if file == "config.json":
        assert_part_refused(folder, part, path, words)
    elif b"_use_default" not in content:
        assert_refused(lambda: StableDiffusionImageVariationPipeline.from_pretrained(folder), path, words)


ANY_SIZE = [10**7, 2**31, 2**62, 10**400, -1, 0, 1.5, "64", True, [], {}, None]
SIZES = {
    "unet": [
        "in_channels",
        "layers_per_block",
        "norm_num_groups",
        "cross_attention_dim",
        "transformer_layers_per_block",
        "attention_head_dim",
    ],
    "vae": ["out_channels", "layers_per_block", "norm_num_groups", "latent_channels", "sample_size"],
    "image_encoder": [
        "hidden_size",
        "intermediate_size",
        "projection_dim",
        "num_hidden_layers",
        "num_attention_heads",
        "num_channels",
        "image_size",
        "patch_size",
    ],
    "safety_checker": ["projection_dim"],
}


@pytest.mark.parametrize(
    ("part", "setting", "value"),
    [
        *((part, name, value) for part, names in SIZES.items() for name in names for value in ANY_SIZE),
        *(
            (part, "block_out_channels", value)
            for part in ("unet", "vae")
            for value in (
                [2**21] * 2,
                [2**62] * 2,
                [16, -32],
                [16, 0],
                [],
                [16] * 10**5,
                16,
                "16",
                [[16]],
                [16, None],
                {"16": 32},
            )
        ),
        *(
            ("unet", name, value)
            for name in ("down_block_types", "up_block_types")
            for value in ([], ["x"], "DownBlock2D", [3, 4], [["DownBlock2D"], None], {}, None, 3)
        ),
        *(
            ("unet", name, value)
            for name, value in (
                ("act_fn", ["silu"]),
                ("norm_eps", -1),
                ("norm_eps", "1e-5"),
                ("flip_sin_to_cos", "yes"),
                ("freq_shift", 8),
                ("sample_size", [64]),
                ("sample_size", -64),
                ("sample_size", "64"),
                ("time_embedding_dim", -1),
            )
        ),
        ("vae", "scaling_factor", 0),
        ("vae", "scaling_factor", "x"),
        ("vae", "force_upcast", "no"),
        ("image_encoder", "layer_norm_eps", -1e-5),
        ("image_encoder", "hidden_act", ["gelu"]),
        *(
            ("safety_checker", "vision_config", value)
            for value in ("x", 3, [], {"hidden_size": 2**62}, {"patch_size": 2**20})
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_configs(folder, part, setting, value):
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
    key = None if value == 10**7 or isinstance(value, dict) else setting
    words = setting if key else "expected|asks for|cannot be|shape"
    assert_part_refused(folder, part, file, words)


def test_more_layers_than_the_file_has_tensors(folder):
    for part, setting in (
        ("unet", "layers_per_block"),
        ("unet", "transformer_layers_per_block"),
        ("vae", "layers_per_block"),
        ("image_encoder", "num_hidden_layers"),
    ):
        file = folder / part / "config.json"
        config = json.loads(file.read_text())
        for value in (300, 999_999):
            file.write_text(json.dumps(config | {setting: value}))
            assert_part_refused(folder, part, file, r"layers, as .* tensors, got \d+ or more")
        file.write_text(json.dumps(config))


def test_numbers_of_other_libraries_are_accepted():
    config = imvar.CLIPVisionConfig(
        hidden_size=np.int64(24), layer_norm_eps=np.float32(0.5), num_hidden_layers=torch.tensor(3)
    )
    assert [type(config[name]) for name in ("hidden_size", "layer_norm_eps", "num_hidden_layers")] == [int, float, int]
    with pytest.raises(InputError, match=r"CLIPVisionConfig\.hidden_size: expected an integer .*, got '24'") as caught:
        imvar.CLIPVisionConfig(hidden_size="24")
    assert caught.value.key == "hidden_size"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_train_timesteps", 10**6),
        ("num_train_timesteps", 2**62),
        ("num_train_timesteps", "x"),
        ("beta_start", []),
        ("beta_start", 10**400),
        ("beta_end", -1),
        ("beta_schedule", ["linear"]),
        ("trained_betas", "x"),
        ("trained_betas", [[0.1]]),
        ("trained_betas", [0.1]),
        ("trained_betas", [None]),
        ("steps_offset", 2**40),
        ("skip_prk_steps", "no"),
        ("prediction_type", None),
        ("_use_default_values", {"a": 1}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_scheduler_configs(folder, setting, value):
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
    for load in (
        StableDiffusionImageVariationPipeline.from_pretrained,
        lambda folder: imvar.PNDMScheduler.from_pretrained(folder, subfolder="scheduler"),
    ):
        assert_refused(lambda load=load: load(folder), file, setting, key=setting)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_start": 0, "beta_end": 0},
        {"sigma_max": "x", "use_exponential_sigmas": True},
        {"sigma_min": -1, "use_beta_sigmas": True},
    ],
    ids=str,
)
def test_configs_without_a_scheduler(tmp_path, settings):
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps(settings))
    assert_refused(lambda: imvar.LMSDiscreteScheduler.from_pretrained(tmp_path), file, "noise levels|sigma_")


# Indexes


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "weight_map: expected a dictionary"),
        ({"weight_map": []}, "weight_map: expected a dictionary"),
        ({"weight_map": {}}, "weight_map: expected a dictionary"),
        ({"weight_map": {str(i): str(i) for i in range(10**4)}}, "expected at most 8192 tensors, got 10000"),
        ({"weight_map": {"a": 3}}, "weight_map: expected a dictionary"),
        ({"weight_map": {"a": ["x"]}}, "weight_map: expected a dictionary"),
        ({"weight_map": {"a": "../x.safetensors"}}, "a: expected a weights file next to the index"),
        ({"weight_map": {"a": "/etc/passwd"}}, "a: expected a weights file next to the index"),
        ({"weight_map": {"a": "x/y.safetensors"}}, "a: expected a weights file next to the index"),
        ({"weight_map": {"a": ".."}}, "a: expected a weights file next to the index"),
        ({"weight_map": {"a": ""}}, "a: expected a weights file next to the index"),
        ({"weight_map": {"a": "{self}"}}, "a: expected a weights file next to the index"),
        ({"weight_map": {"a": "\0"}}, "expected a valid path"),
        ({"weight_map": {"a": "\ud800"}}, "expected a valid path"),
        ({"weight_map": {"a": "x" * 1000}}, "too long"),
        ({"weight_map": {"a": "none.safetensors"}}, "no such file"),
        (
            {"weight_map": {"a": "part.safetensors"}},
            "expected part.safetensors with the tensors that the index lists, got a file without",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
@every_part
def test_indexes(folder, part, index, words):
    file = weights(folder, part)
    path = folder / part / f"{file.name}.index.json"
    file.rename(folder / part / "part.safetensors")
    path.write_text(json.dumps(index).replace("{self}", path.name))
    with pytest.raises(CheckpointError, match=words) as caught:
        CLASSES[part].from_pretrained(folder, subfolder=part)
    assert_part_refused(folder, part, caught.value.path, words)
    assert caught.value.path.parent == folder / part or "x" * 1000 in str(caught.value.path)
    tensors = load_file(folder / part / "part.safetensors")
    path.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "part.safetensors")}))  # metadata may be missing
    CLASSES[part].from_pretrained(folder, subfolder=part)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("unet", "UNet2DConditionModel"),
        ("unet", {"a": 1}),
        ("unet", 3),
        ("unet", True),
        ("unet", []),
        ("vae", [3, ["AutoencoderKL"]]),
        ("scheduler", ["diffusers", None]),
        ("scheduler", ["os", "system"]),
        ("requires_safety_checker", "yes"),
        ("requires_safety_checker", 1),
        ("requires_safety_checker", None),
        ("requires_safety_checker", [True]),
    ],
    ids=str,
)
def test_model_index(folder, key, value):
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {key: value}))
    assert_refused(
        lambda: StableDiffusionImageVariationPipeline.from_pretrained(folder),
        path,
        "expected .*, got|handed over",
        key,
    )


def test_an_unlisted_part(folder):
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in index.items() if name != "unet"}))
    assert_refused(
        lambda: StableDiffusionImageVariationPipeline.from_pretrained(folder), path, "got no entry", key="unet"
    )
    path.write_text(json.dumps(index | {"feature_extractor": [None, None]}))
    assert_refused(
        lambda: StableDiffusionImageVariationPipeline.from_pretrained(folder), path, "for the safety checker, got None"
    )
