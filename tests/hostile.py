"""Loads that have to be refused: at once, in little memory, with an error that says why."""

import resource
import time

import pytest

import imvar
from imvar import CheckpointError, StableDiffusionImageVariationPipeline

CLASSES = {"vae": imvar.AutoencoderKL, "unet": imvar.UNet2DConditionModel,
           "image_encoder": imvar.CLIPVisionModelWithProjection, "safety_checker": imvar.StableDiffusionSafetyChecker}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"

every_part = pytest.mark.parametrize("part", CLASSES)


def refuses(load, path, words, key=None):
    """Loading raises a CheckpointError with this path, reason and key, in a second's work and 200 MB."""
    before, work, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), time.perf_counter()
    with pytest.raises(CheckpointError, match=words) as caught:
        load()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert time.process_time() - work < 1  # of its own, whatever else the machine is busy with
    assert time.perf_counter() - start < 10
    error = caught.value
    assert error.path == path
    assert str(path) in str(error)
    assert len(str(error)) < 3000
    assert key is None or error.key == key
    assert "weights_only" not in str(error)


def refuses_part(folder, part, path, words, key=None):
    """So does the part alone, and so does the pipeline."""
    refuses(lambda: CLASSES[part].from_pretrained(folder, subfolder=part), path, words, key)
    refuses(lambda: StableDiffusionImageVariationPipeline.from_pretrained(folder), path, words, key)


def weights(folder, part):
    return next((folder / part).glob("*.safetensors"))
