"""An independently trained judge classifies imvar-emoji's variations of held-out drawings; and a control.

The thresholds are measurements of `scripts/evaluate_emoji.py` on 300 images minus three standard errors; the first 120
of these give 0.683 and 0.792. All on one thread: the threads of two models of this size wait for each other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from train_emoji import judging
from train_emoji.catalogue import REDUCED, codes
from train_emoji.measures import accuracy, variations

from imvar import StableDiffusionImageVariationPipeline

ASSETS = Path(__file__).parents[1] / "emoji"
LABELS = [drawing["code"] for drawing in json.loads((ASSETS / "held-out.json").read_text(encoding="utf-8"))]
CLASSES = codes(REDUCED.concepts)  # classes of the judge
MIN_TOP1, MIN_TOP5 = 0.687 - 3 * 0.027, 0.787 - 3 * 0.024
MAX_SHUFFLED = 5 / 187  # chance; measured was 0 of 130
N_VARIATIONS, N_SHUFFLED = 120, 60  # two and one of each drawing


@pytest.fixture(scope="module")
def drawings():
    sheet = torch.from_numpy(np.array(Image.open(ASSETS / "held-out.png"))) / 255
    return rearrange(sheet, "(y h) (x w) c -> (y x) c h w", h=64, w=64)[: len(LABELS)]


@pytest.fixture(scope="module")
def judge():
    return judging.read(ASSETS / "judge.safetensors")


@pytest.fixture(scope="module")
def pipe():
    """Without the safety checker, which may flag some of the drawings."""
    pipe: Any = StableDiffusionImageVariationPipeline.from_pretrained(
        "imvar-emoji", safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_judge_classifies_the_drawings(judge, drawings):
    assert len(LABELS) == len(drawings) == len(REDUCED.held_out) - 3  # three of the concepts are newer than the style
    assert accuracy(judge, drawings, LABELS, CLASSES).top1.value >= 0.65


def test_variations_of_held_out_drawings_are_classified(pipe, judge, drawings):
    result = accuracy(judge, *variations(pipe, drawings, LABELS, N_VARIATIONS)[:2], CLASSES)
    assert result.top1.value >= MIN_TOP1
    assert result.top5.value >= MIN_TOP5


def test_with_shuffled_embeddings_accuracy_is_at_chance(pipe, judge, drawings):
    """The same noise with the embedding of another drawing."""
    indices = [(i + len(LABELS) // 2) % len(LABELS) for i in range(len(LABELS))]
    images, labels, _ = variations(pipe, drawings[indices], LABELS, N_SHUFFLED)
    assert accuracy(judge, images, labels, CLASSES).top5.value <= MAX_SHUFFLED
