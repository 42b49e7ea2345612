"""Loads that have to be refused: at once, in little memory, with an error that says why."""

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


def refuses(load, path, words, key=None):
    """Loading raises a CheckpointError with this path, reason and key, in a second's work and 200 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gc.disable()  # to look for garbage in all that the other tests have loaded is no work of the load
    work, start = time.process_time(), time.perf_counter()
    try:
        with pytest.raises(CheckpointError, match=words) as caught:
            load()
        worked, took = time.process_time() - work, time.perf_counter() - start
    finally:
        gc.enable()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert worked < 1  # of its own, whatever else the machine is busy with
    assert took < 10
    error = caught.value
    assert error.path == path
    assert printable(str(path)) in str(error)
    assert str(error).isprintable()  # lest a name in a file writes over the terminal
    assert len(str(error)) < 3000
    assert key is None or error.key == key
    assert "weights_only" not in str(error)


def refuses_part(folder, part, path, words, key=None):
    """So does the part alone, and so does the pipeline."""
    refuses(lambda: CLASSES[part].from_pretrained(folder, subfolder=part), path, words, key)
    refuses(lambda: StableDiffusionImageVariationPipeline.from_pretrained(folder), path, words, key)


def weights(folder, part):
    return next((folder / part).glob("*.safetensors"))
