"""Assertions that a load is refused: quickly, in little memory, with an error that names the reason."""

import gc
import resource
import time

import pytest

import imvar
from imvar import CheckpointError, StableDiffusionImageVariationPipeline
from imvar.errors import printable

CLASSES = {
    "vae": imvar.AutoencoderKL,
    "unet": imvar.UNet2DConditionModel,
    "image_encoder": imvar.CLIPVisionModelWithProjection,
    "safety_checker": imvar.StableDiffusionSafetyChecker,
}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"

every_part = pytest.mark.parametrize("part", CLASSES)


def assert_refused(load, path, words, key=None):
    """Assert that `load` raises a CheckpointError with this path, reason and key within 1 s of CPU time and 200 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gc.disable()  # a collection of what other tests loaded would count as time of this load
    work, start = time.process_time(), time.perf_counter()
    try:
        with pytest.raises(CheckpointError, match=words) as caught:
            load()
        worked, took = time.process_time() - work, time.perf_counter() - start
    finally:
        gc.enable()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert worked < 1  # CPU time, independent of the machine's load
    assert took < 10
    error = caught.value
    assert error.path == path
    assert printable(str(path)) in str(error)
    assert str(error).isprintable()  # so that no name in a file controls the terminal
    assert len(str(error)) < 3000
    assert key is None or error.key == key
    assert "weights_only" not in str(error)


def assert_part_refused(folder, part, path, words, key=None):
    """Assert that loading the part and loading the pipeline are refused."""
    assert_refused(lambda: CLASSES[part].from_pretrained(folder, subfolder=part), path, words, key)
    assert_refused(lambda: StableDiffusionImageVariationPipeline.from_pretrained(folder), path, words, key)


def weights(folder, part):
    return next((folder / part).glob("*.safetensors"))
