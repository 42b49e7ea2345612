"""The published revisions, without their weights: every config is supported, every tensor is loaded."""

from __future__ import annotations

import json

import pytest
import torch

import imvar
from imvar import schedulers
from imvar.weights import load
from imvar.weights.model_index import PARTS
from tests.support.published_checkpoint import PUBLISHED, Checkpoint, draw, key_list
from tests.support.random_checkpoint import tiny_pipeline

MODELS = {  # class and number of parameters
    "unet": (imvar.UNet2DConditionModel, 859_520_964),
    "vae": (imvar.AutoencoderKL, 83_653_863),
    "image_encoder": (imvar.CLIPVisionModelWithProjection, 303_966_208),
    "safety_checker": (imvar.StableDiffusionSafetyChecker, 303_981_588),
}
LISTS = {
    "unet": "unet",
    "vae": "vae",
    "vae_legacy": "vae",
    "image_encoder": "image_encoder",
    "safety_checker": "safety_checker",
}
REVISIONS = ["v2.0", "v1.0", "old-2ddbd90"]
SCHEDULERS = [*REVISIONS, "main"]


def settings(revision: str, file: str) -> dict:
    return json.loads((PUBLISHED / revision / file).read_text())


def meta_model(part: str, revision: str = "v2.0") -> torch.nn.Module:
    model, _ = MODELS[part]
    with torch.device("meta"):
        return model(model.read_config(PUBLISHED / revision / part / "config.json"))


def with_single_prefix(key: str) -> str:
    return key.replace("vision_model.vision_model", "vision_model")


def published_tensors(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in key_list(name).items()}


@pytest.mark.parametrize("revision", REVISIONS)
@pytest.mark.parametrize("part", MODELS)
def test_every_model_is_built_at_its_size(part, revision):
    model = meta_model(part, revision)
    assert model.num_parameters() == MODELS[part][1]
    given = settings(revision, f"{part}/config.json")
    if part == "image_encoder" and "vision_config" in given:  # the old revision's is a whole CLIP model
        given = given["vision_config"] | {"projection_dim": given["projection_dim"]}
    assert model.config.fields_set
    assert all(model.config[key] == given[key] for key in model.config.fields_set - {"vision_config"})


@pytest.mark.parametrize("name", LISTS)
def test_every_published_tensor_is_loaded(name):
    model, tensors = meta_model(LISTS[name]), published_tensors(name)
    load(model, tensors)  # raises for a missing, unknown or misshapen tensor
    ids = {key for key in tensors if key.endswith("position_ids")}
    assert len(model.state_dict()) == len(tensors) - len(ids)
    load(model, {key: tensor for key, tensor in tensors.items() if key not in ids})


@pytest.mark.parametrize("name", LISTS)
def test_other_tensors_are_refused(name):
    model, tensors = meta_model(LISTS[name]), published_tensors(name)
    for key in (next(iter(tensors)), list(tensors)[-1]):
        with pytest.raises(imvar.CheckpointError, match="missing"):
            load(model, {other: tensor for other, tensor in tensors.items() if other != key})
        with pytest.raises(imvar.CheckpointError, match="shape"):
            load(model, tensors | {key: torch.empty(2, 7, device="meta")})
        with pytest.raises(imvar.CheckpointError, match="unknown"):
            load(model, tensors | {f"{key}.more": tensors[key]})


def test_checker_loads_single_and_doubled_prefixes():
    tensors = published_tensors("safety_checker")
    load(meta_model("safety_checker"), {with_single_prefix(key): tensor for key, tensor in tensors.items()})


@pytest.mark.parametrize("part", MODELS)
def test_saved_names_are_the_current_names(part):
    model = meta_model(part)
    names = {with_single_prefix(key) for key in key_list(part)}
    saved = model.keymap.to_file(model.state_dict())
    assert saved.keys() == {name for name in names if not name.endswith("position_ids")}


@pytest.mark.parametrize("revision", SCHEDULERS)
@pytest.mark.parametrize("name", schedulers.__all__)
def test_schedulers_keep_the_given_config(name, revision):
    scheduler = getattr(imvar, name)
    given = settings(revision, "scheduler/scheduler_config.json")
    config = scheduler.from_pretrained(PUBLISHED / revision, subfolder="scheduler").config
    assert all(config[key] == value for key, value in given.items() if key != "_class_name")
    if name in ("DDIMScheduler", "DDPMScheduler"):
        assert config.clip_sample is (revision != "main")


@pytest.mark.parametrize("revision", REVISIONS)
def test_feature_extractors_agree(revision):
    config = imvar.CLIPImageProcessor.from_pretrained(PUBLISHED / revision, subfolder="feature_extractor").config
    given = settings(revision, "feature_extractor/preprocessor_config.json")
    assert config.size == {"shortest_edge": 224}
    assert config.crop_size == {"height": 224, "width": 224}
    for key in given.keys() & {"resample", "do_resize", "do_center_crop", "do_normalize", "do_convert_rgb"}:
        assert config[key] == given[key]
    assert list(config.image_mean) == given["image_mean"]
    assert list(config.image_std) == given["image_std"]


@pytest.mark.parametrize("revision", REVISIONS)
def test_every_class_of_every_index_is_registered(revision):
    index = settings(revision, "model_index.json")
    classes = {name: value[1] for name, value in index.items() if isinstance(value, list)}
    assert classes.keys() == PARTS.keys()
    assert all(name in PARTS[part] for part, name in classes.items())


def test_random_tensors_preserve_variance():
    generator = torch.Generator().manual_seed(0)
    weight = draw("conv.weight", [64, 32, 3, 3], torch.float32, generator)
    x = torch.randn(1, 32, 9, 9, generator=generator)
    assert torch.nn.functional.conv2d(x, weight).std() == pytest.approx(1, abs=0.1)
    assert draw("norm.weight", [512], torch.float32, generator).mean() == pytest.approx(1, abs=0.1)
    assert draw("x.position_ids", [1, 5], torch.int64, generator).tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_verify_reference_runs_on_a_tiny_model(tmp_path):
    verify_reference = pytest.importorskip("verify_reference")
    tiny_pipeline().save_pretrained(tmp_path)
    compared = list(verify_reference.verify(Checkpoint(tmp_path), steps=2))
    assert {row.component for row in compared} == verify_reference.CLASSES.keys()
    assert all(row.ok for row in compared), verify_reference.table(compared)
