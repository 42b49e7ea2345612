"""Tiny models and quiet progress bars for every test."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from random_checkpoint import tiny_pipeline

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
    """A folder with a whole tiny checkpoint, written by imvar."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_pipeline().save_pretrained(folder)
    return folder
