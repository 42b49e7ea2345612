"""Tiny models and quiet progress bars for every test."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from imvar import StableDiffusionImageVariationPipeline
from imvar.conversion import convert
from tests.support.original_checkpoint import LAYOUTS, original, write
from tests.support.published_checkpoint import write_checkpoint
from tests.support.random_checkpoint import tiny_pipeline

pytest.register_assert_rewrite("tests.support.refusals", "tests.support.expected_tensors", "tests.support.crashes")
PHOTOS = Path(__file__).parent / "photos"


@pytest.fixture(autouse=True)
def _one_thread_is_quickest():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photo():
    return Image.open(PHOTOS / "chelsea.jpg").convert("RGB")


@pytest.fixture
def pipe():
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a whole tiny checkpoint, loaded once: no test is charged for what the libraries do only once."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_pipeline().save_pretrained(folder)
    StableDiffusionImageVariationPipeline.from_pretrained(folder)
    return folder


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A folder as it was published, tiny and with random weights: pickles, and safetensors of the same."""
    folder = tmp_path_factory.mktemp("published")
    write_checkpoint(folder, tiny=True)
    return folder


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """A tiny original file of each layout."""
    folder = tmp_path_factory.mktemp("originals")
    files = {layout: folder / f"{layout}.ckpt" for layout in LAYOUTS}
    for layout, file in files.items():
        write(file, original(layout))
    return files


@pytest.fixture(scope="session")
def converted(originals, tmp_path_factory):
    """The folder in diffusers' layout that each of the original files becomes."""
    folder = tmp_path_factory.mktemp("converted")
    for layout, file in originals.items():
        convert(file, folder / layout)
    return {layout: folder / layout for layout in originals}


@pytest.fixture(scope="session")
def small(checkpoint, tmp_path_factory):
    """An original file of a megabyte, with its settings in it."""
    file = tmp_path_factory.mktemp("small") / "small.safetensors"
    convert(checkpoint, file, to="original")
    return file


@pytest.fixture
def no_fsync(monkeypatch):
    """A killed process loses nothing that it has written, synchronised or not; waiting for the disk takes long."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
