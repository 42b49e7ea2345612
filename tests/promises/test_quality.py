"""imvar-emoji makes variations that a judge, trained apart from it, can name: of held-out drawings; and a control.

The least are what `scripts/evaluate_emoji.py` measured of the same pictures, less three standard errors.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from train_emoji import judging
from train_emoji.catalogue import REDUCED, codes
from train_emoji.measures import identity, variations

from imvar import StableDiffusionImageVariationPipeline

ASSETS = Path(__file__).parents[1] / "emoji"
LABELS = [drawing["code"] for drawing in json.loads((ASSETS / "held-out.json").read_text(encoding="utf-8"))]
AMONG = codes(REDUCED.concepts)  # what the judge chooses among
LEAST_TOP1, LEAST_TOP5 = 0.687 - 3 * 0.027, 0.787 - 3 * 0.024  # of 300 variations
MOST_SHUFFLED = 5 / 187  # chance; of 130, not one was measured


@pytest.fixture(autouse=True)
def _one_thread_is_quickest():
    """Not here, where hundreds of pictures are made."""
    torch.set_num_threads(os.cpu_count() or 1)


@pytest.fixture(scope="module")
def pictures():
    sheet = torch.from_numpy(np.array(Image.open(ASSETS / "held-out.png"))) / 255
    return rearrange(sheet, "(y h) (x w) c -> (y x) c h w", h=64, w=64)[: len(LABELS)]


@pytest.fixture(scope="module")
def judge():
    return judging.read(ASSETS / "judge.safetensors")


@pytest.fixture(scope="module")
def pipe():
    """Without the checker, which would make black what it takes for a dagger."""
    pipe: Any = StableDiffusionImageVariationPipeline.from_pretrained(
        "imvar-emoji", safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_judge_knows_the_drawings(judge, pictures):
    assert len(LABELS) == len(pictures) == len(REDUCED.held_out) - 3  # three of the concepts are younger than a vendor
    assert identity(judge, pictures, LABELS, AMONG).top1.value >= 0.65


def test_variations_of_held_out_drawings_are_named(pipe, judge, pictures):
    found = identity(judge, *variations(pipe, pictures, LABELS, 300)[:2], AMONG)
    assert found.top1.value >= LEAST_TOP1
    assert found.top5.value >= LEAST_TOP5


def test_with_shuffled_embeddings_they_are_not(pipe, judge, pictures):
    """The same noise, told of another drawing: what is asked for comes out no oftener than by chance."""
    places = [(i + len(LABELS) // 2) % len(LABELS) for i in range(len(LABELS))]
    made, labels, _ = variations(pipe, pictures[places], LABELS, 130)
    assert identity(judge, made, labels, AMONG).top5.value <= MOST_SHUFFLED
