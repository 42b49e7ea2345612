"""scripts/evaluate_finetune.py on a few drawings of the tests, with two steps of training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_finetune import Data, evaluate, load_result, require_learning, table
from finetune_evaluation.estimates import fixed_losses
from finetune_evaluation.fxemoji import NEAR_COPY, concepts, split
from PIL import Image
from train_emoji.drawings import Drawings
from train_emoji.measures import nearest

EMOJI = Path(__file__).parents[1] / "emoji"


@pytest.fixture(scope="module")
def drawings():
    points = np.array([entry["code"] for entry in json.loads((EMOJI / "held-out.json").read_text(encoding="utf-8"))])
    grid = torch.from_numpy(np.array(Image.open(EMOJI / "held-out.png").convert("RGBA")))
    images = grid.unflatten(1, (-1, 64)).unflatten(0, (-1, 64)).permute(0, 2, 4, 1, 3).flatten(0, 1)[: len(points)]
    return Drawings(images, points, np.full(len(points), "tests"))


def test_an_evaluation(drawings, tmp_path):
    parts = [drawings.take(torch.arange(*bounds)) for bounds in ((0, 9), (9, 14), (14, 17))]
    data = Data(*parts, {point: point for i, point in enumerate(drawings.codes) if i not in (12, 13, 15)})
    result = evaluate(data, tmp_path / "out", {"lora": "1e-2"}, steps=2)
    real, base, lora = result["rows"]
    assert result["drawings"] == {
        **{"trained": 9, "held-out": 5, "control": 3},
        **{"trained, judged": 9, "held-out, judged": 3, "control, judged": 2},
    }
    assert real.keys() == {"model", "held-out", "control"}
    assert base["held-out"]["change"] is None
    losses = fixed_losses(load_result(), parts[1].rgb())
    assert base["held-out"]["loss"]["value"] == pytest.approx(float(losses.mean()), rel=1e-6)
    change = fixed_losses(load_result(tmp_path / "out" / "lora"), parts[1].rgb()) - losses
    assert lora["held-out"]["change"]["value"] == pytest.approx(float(change.mean()), rel=1e-4)
    assert lora["held-out"]["change"]["error"] == pytest.approx(float(change.std()) / 5**0.5, rel=1e-4)
    assert change.abs().min() > 0
    assert Image.open(tmp_path / "out" / "variations.png").size == (9 * 64, 64)  # 3 drawings: input, base, LoRA
    assert [line.count("|") for line in table(result["rows"]).splitlines()] == [10] * 5


def test_a_change_within_three_standard_errors_is_refused():
    def row(value):
        return {"model": "lora", "held-out": {"change": {"value": value, "error": 0.001}}}

    require_learning([row(-0.0031)])
    for value in (-0.0029, 0.004):
        with pytest.raises(SystemExit, match="lora: expected a lower loss by more than 3 standard errors, got"):
            require_learning([row(value)])


def test_the_split_has_no_near_copies(drawings):
    """Each eighth drawing validates, each fourth is held out, except copies of training drawings."""
    images = torch.cat([drawings.images[:24], drawings.images[:1]])
    images[3] = images[0]
    names = np.array([f"{i:02d}" for i in range(25)])
    trained, validation, held_out = split(Drawings(images, names, names))
    assert validation.codes.tolist() == ["01", "09", "17"]
    assert held_out.codes.tolist() == ["07", "11", "15", "19", "23"]
    assert len(trained) + len(validation) + len(held_out) == 24
    assert nearest(held_out.rgb(), trained.rgb()).min() >= NEAR_COPY


def test_concepts_by_mozillas_names():
    names = concepts()
    assert names["bunny"] == "1f430"
    assert names["koala"] == "1f428"
    assert len(set(names.values())) == 187
