"""diffusers and transformers beside ours: the same tiny configurations, the same weights."""

import copy
import functools
import logging

import diffusers
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

import imvar
from tests.support.random_checkpoint import (
    PUBLISHED_SCHEDULER,
    TINY_CHECKER,
    TINY_ENCODER,
    TINY_UNET,
    TINY_VAE,
    randomize,
)

diffusers.utils.logging.set_verbosity(logging.CRITICAL)
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity(logging.CRITICAL)
transformers.utils.logging.disable_progress_bar()


def make_reference(seed=0, threshold=0.9, **unet):
    """A tiny pipeline of diffusers with random weights; a low `threshold` flags some pictures."""
    checker = StableDiffusionSafetyChecker(transformers.CLIPConfig(**TINY_CHECKER))
    parts = {
        "vae": diffusers.AutoencoderKL(**TINY_VAE),
        "image_encoder": transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**TINY_ENCODER)),
        "unet": diffusers.UNet2DConditionModel(**(TINY_UNET | unet)),
        "safety_checker": checker,
    }
    for i, model in enumerate(parts.values()):
        randomize(model, seed + i)
    torch.nn.init.constant_(checker.concept_embeds_weights, threshold)
    torch.nn.init.constant_(checker.special_care_embeds_weights, threshold)
    pipe = diffusers.StableDiffusionImageVariationPipeline(
        **parts,
        scheduler=diffusers.PNDMScheduler(**PUBLISHED_SCHEDULER),
        feature_extractor=transformers.CLIPImageProcessorPil(size=32, crop_size=32),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def ref_folder(tmp_path_factory):
    """A folder with a whole tiny checkpoint, written by diffusers."""
    folder = tmp_path_factory.mktemp("reference")
    make_reference().save_pretrained(folder)
    return folder


@functools.cache
def loaded(library, folder):
    """A pipeline, of which each test gets a copy: loading takes longer."""
    pipe = library.StableDiffusionImageVariationPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def ref(ref_folder):
    return copy.deepcopy(loaded(diffusers, ref_folder))


@pytest.fixture
def ours(ref_folder):
    return copy.deepcopy(loaded(imvar, ref_folder))
