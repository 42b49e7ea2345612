"""What is wrong with a checkpoint can be caught as the class that diffusers or transformers raises for it."""

import json
import pickle
import shutil

import diffusers
import pytest
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file

import imvar
from imvar import CheckpointError
from tests.reference.conftest import ref_folder

__all__ = ["ref_folder"]

THEIRS = {
    "": diffusers.StableDiffusionImageVariationPipeline,
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
    "image_encoder": transformers.CLIPVisionModelWithProjection,
    "safety_checker": StableDiffusionSafetyChecker,
}
PARTS = [part for part in THEIRS if part]


def weights(folder, part):
    return next((folder / part).glob("*.safetensors"))


def double_a_tensor(folder, part):
    tensors = load_file(weights(folder, part))
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name] = tensors[name].repeat(2, 1)
    save_file(tensors, weights(folder, part), {"format": "pt"})


def cut_weights(folder, part):
    weights(folder, part).write_bytes(weights(folder, part).read_bytes()[:5000])


def edit_index(folder, **changes):
    index = json.loads((folder / "model_index.json").read_text())
    index = {key: value for key, value in (index | changes).items() if value is not None}
    (folder / "model_index.json").write_text(json.dumps(index))


FAULTS = {
    "no file of the variant": (lambda folder, part: None, {"variant": "fp16"}),
    "no pickle": (lambda folder, part: None, {"use_safetensors": False}),
    "a misshapen tensor": (double_a_tensor, {}),
    "no weights": (lambda folder, part: weights(folder, part).unlink(), {}),
    "no config": (lambda folder, part: (folder / part / "config.json").unlink(), {}),
    "a config that is not JSON": (lambda folder, part: (folder / part / "config.json").write_text("{"), {}),
    "no folder of the part": (lambda folder, part: shutil.rmtree(folder / part), {}),
    "no folder": (lambda folder, part: shutil.rmtree(folder), {}),
}
OF_THE_INDEX = {
    "no file of the variant": (lambda folder: None, {"variant": "fp16"}),
    "no pickle": (lambda folder: None, {"use_safetensors": False}),
    "no index": (lambda folder: (folder / "model_index.json").unlink(), {}),
    "an index that is not JSON": (lambda folder: (folder / "model_index.json").write_text("{"), {}),
    "no entry": (lambda folder: edit_index(folder, unet=None), {}),
    "an unknown class": (lambda folder: edit_index(folder, unet=["diffusers", "NoSuchModel"]), {}),
    "no scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), {}),
    "no image processor": (lambda folder: shutil.rmtree(folder / "feature_extractor"), {}),
    "no folder": (lambda folder: shutil.rmtree(folder), {}),
}


def assert_caught_as_theirs(folder, part, options):
    """Assert that clauses for Python's own exceptions that catch the error of the reference catch imvar's, too."""
    options = options | ({"subfolder": part} if part else {})
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        THEIRS[part].from_pretrained(str(folder), **options)
    with pytest.raises(CheckpointError) as ours:
        getattr(imvar, THEIRS[part].__name__).from_pretrained(str(folder), **options)
    classes = {OSError, ValueError, RuntimeError}.intersection(type(theirs.value).__mro__)
    assert classes
    for caught in classes:
        assert isinstance(ours.value, caught)


@pytest.fixture
def folder(ref_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return shutil.copytree(ref_folder, tmp_path / "checkpoint")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_part_is_caught_as_in_the_reference(folder, part, fault):
    spoil, options = FAULTS[fault]
    spoil(folder, part)
    assert_caught_as_theirs(folder, part, options)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("fault", ["a misshapen tensor", "no weights", "no config"])
def test_a_pipeline_with_a_faulty_part_is_caught_as_in_the_reference(folder, part, fault):
    FAULTS[fault][0](folder, part)
    assert_caught_as_theirs(folder, "", {})


@pytest.mark.parametrize("fault", OF_THE_INDEX)
def test_a_faulty_pipeline_is_caught_as_in_the_reference(folder, fault):
    spoil, options = OF_THE_INDEX[fault]
    spoil(folder)
    assert_caught_as_theirs(folder, "", options)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_damaged_file_is_caught_as_in_diffusers(folder, part):
    cut_weights(folder, part)
    assert_caught_as_theirs(folder, part, {})
    assert_caught_as_theirs(folder, "", {})


def test_the_error_is_whole_after_pickling(folder):
    double_a_tensor(folder, "unet")
    with pytest.raises(CheckpointError) as caught:
        imvar.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    error = caught.value
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is CheckpointError
    assert (str(copied), copied.reason, copied.path, copied.key) == (str(error), error.reason, error.path, error.key)
    assert error.path == weights(folder, "unet")
    assert (error.errno, error.strerror, error.filename) == (None, None, None)
    assert error.args == (str(error),)
