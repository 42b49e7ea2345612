"""Fixtures of all tests: tiny models, checkpoints in every layout, a photo."""

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
from tests.support.wheel import distributions, installed_python  # noqa: F401 (fixtures)

pytest.register_assert_rewrite("tests.support.refusals", "tests.support.expected_tensors", "tests.support.crashes")
PHOTOS = Path(__file__).parent / "photos"


def pytest_collection_modifyitems(items):
    """Mark tests by folder, so that `-m "not reference"` selects."""
    for item in items:
        for marker in {"cuda", "reference"} & set(item.path.parts):
            item.add_marker(marker)


@pytest.fixture(autouse=True)
def _single_thread():
    """Run models as small as these on one thread, which is faster."""
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
    """A complete tiny checkpoint, loaded once so that no test pays for one-time work of the libraries."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_pipeline().save_pretrained(folder)
    StableDiffusionImageVariationPipeline.from_pretrained(folder)
    return folder


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of `checkpoint` for tests that corrupt it."""
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A folder in the published layout, tiny and with random weights, as pickles and as safetensors."""
    folder = tmp_path_factory.mktemp("published")
    write_checkpoint(folder, tiny=True)
    return folder


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """A tiny original file per layout."""
    folder = tmp_path_factory.mktemp("originals")
    files = {layout: folder / f"{layout}.ckpt" for layout in LAYOUTS}
    for layout, file in files.items():
        write(file, original(layout))
    return files


@pytest.fixture(scope="session")
def converted(originals, tmp_path_factory):
    """Each original file, converted to a folder in diffusers' layout."""
    folder = tmp_path_factory.mktemp("converted")
    for layout, file in originals.items():
        convert(file, folder / layout)
    return {layout: folder / layout for layout in originals}


@pytest.fixture(scope="session")
def small(checkpoint, tmp_path_factory):
    """An original file of a megabyte with its configs in the metadata."""
    file = tmp_path_factory.mktemp("small") / "small.safetensors"
    convert(checkpoint, file, to="original")
    return file


@pytest.fixture
def no_fsync(monkeypatch):
    """Skip fsync: a killed process loses nothing that it has written, and waiting for the disk is slow."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
