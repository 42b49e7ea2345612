"""`scripts/finetune.py` on two ranks equals one rank, and would not if the ranks had the same images."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from finetuning.state import read_state
from finetuning.trainable import choose_parameters

from imvar import StableDiffusionImageVariationPipeline
from tests.support.trainings import (
    ROOT,
    assert_same,
    environment,
    finetune,
    launch,
    run_trainings,
    write_drawings,
)
from tests.support.wheel import once

STEPS = 12
TOLERANCE = 0.01  # of the largest movement of any weight
CASES = {  # name: its settings on two ranks, and the run on one rank that it equals
    "cross-attention": ({"stage": "cross-attention"}, "cross-attention"),
    "unet": ({"stage": "unet"}, "unet"),
    "lora": ({"stage": "lora"}, "lora"),
    "unet, in shards, validated": ({"stage": "unet", "shard": True, "sample_every": 5}, "unet"),
    "lora, in shards, accumulated": (
        {"stage": "lora", "shard": True, "batch": 1, "gradient_accumulation": 2},
        "lora",
    ),
}
ON_ONE = {
    "cross-attention": {"stage": "cross-attention"},
    "unet": {"stage": "unet"},
    "lora": {"stage": "lora"},
    "lora, accumulated": {"stage": "lora", "batch": 2, "gradient_accumulation": 2},
    "lora in bfloat16": {"stage": "lora", "mixed_precision": "bf16"},
}
FAULTS = {"not finite": {"save_every": 2}, "other images": {}}


def training(folder, ranks, name, settings, fault=None):
    """Return a training in a plan, whose output is `folder/RANKS/NAME`."""
    images = sorted(map(str, (folder / "drawings").iterdir()))
    shared = {"images": images, "out": str(folder / str(ranks) / name), "resolution": 32, "learning_rate": 1e-3}
    shared |= {"batch": 4 // ranks, "steps": STEPS, "samples": 0, "workers": 0, "cpu": True, "save_every": STEPS}
    return {"settings": shared | settings, "fault": fault}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A folder with drawings, and the outputs of runs on one rank in `1`."""

    def make(folder):
        write_drawings(folder / "drawings")
        run_trainings({name: training(folder, 1, name, settings) for name, settings in ON_ONE.items()}, folder)

    return once(tmp_path_factory, "one-rank", make)


@pytest.fixture(scope="module")
def folder(one, tmp_path_factory):
    """The same folder, with the outputs of runs on two ranks in `2`."""

    def make(_):
        plan = {name: training(one, 2, name, settings) for name, (settings, _) in CASES.items()}
        plan["unet, in shards, validated"]["settings"]["validate"] = [str(one / "drawings" / "00.png")]
        plan["same"] = training(one, 2, "same", {"stage": "lora"}, "same batches")
        plan |= {name: training(one, 2, name, settings, name) for name, settings in FAULTS.items()}
        run_trainings(plan, one, ranks=2)

    once(tmp_path_factory, "two-ranks", make)
    return one


def start(stage):
    """Return the parameters of a stage before the first step."""
    torch.manual_seed(0)
    unet = StableDiffusionImageVariationPipeline.from_pretrained("imvar-emoji").unet
    return {name: parameter.detach() for name, parameter in choose_parameters(unet, stage).items()}


def difference(first, second, stage, of="parameters"):
    """Return the largest difference of two runs' weights, in units of the largest movement of any weight."""
    a, b, origin = read_state(first)[of], read_state(second)[of], start(stage)
    assert list(a) == list(b) == list(origin)
    movement = max(float((a[name] - origin[name]).abs().max()) for name in a)
    assert movement > 5e-3  # as steps of 1e-3 are made
    return max(float((a[name] - b[name]).abs().max()) for name in a) / movement


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(folder, name):
    settings, reference = CASES[name]
    found = {
        of: difference(folder / "1" / reference, folder / "2" / name, settings["stage"], of)
        for of in ("parameters", "average")
    }
    print(name, found)
    assert max(found.values()) < TOLERANCE


def test_accumulated_batches_equal_one(one):
    found = difference(one / "1" / "lora", one / "1" / "lora, accumulated", "lora")
    print(found)
    assert found < TOLERANCE


def test_ranks_with_the_same_batches_differ_from_one(folder):
    found = difference(folder / "1" / "lora", folder / "2" / "same", "lora")
    print(found)
    assert found > 10 * TOLERANCE


def test_autocast_keeps_weights_in_float32_and_close(one):
    state = read_state(one / "1" / "lora in bfloat16")["parameters"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    found = difference(one / "1" / "lora", one / "1" / "lora in bfloat16", "lora")
    print(found)
    assert 0 < found < 0.5


def test_two_ranks_of_accelerate_launch_equal_one(one):
    options = ["--stage", "lora", "--checkpoint", "imvar-emoji", "--resolution", 32, "--learning-rate", 1e-3, "--cpu"]
    options += ["--batch", 2, "--steps", STEPS, "--samples", 0]
    done = finetune([one / "drawings", "--out", one / "launched", *options], 2, "accelerate")
    assert done.stdout.splitlines()[-1] == str(one / "launched" / "pytorch_lora_weights.safetensors")
    found = difference(one / "1" / "lora", one / "launched", "lora")
    print(found)
    assert found < TOLERANCE


def test_a_loss_that_is_not_finite_on_one_rank_ends_all_before_a_save(folder):
    out = folder / "2" / "not finite"
    for rank in range(2):
        assert "expected finite numbers, got nan" in (out / f"ended-{rank}.txt").read_text()
    state = read_state(out)
    assert state["step"] == 2
    assert all(bool(tensor.isfinite().all()) for tensor in state["parameters"].values())


def test_ranks_with_other_images_end(folder):
    for rank in range(2):
        message = (folder / "2" / "other images" / f"ended-{rank}.txt").read_text()
        assert "expected the same images on all ranks" in message


def test_a_killed_rank_ends_the_others_and_the_run_continues(folder):
    """Without `--cpu`: there is no other device."""
    out = folder / "killed"
    options = ["--stage", "lora", "--checkpoint", "imvar-emoji", "--resolution", 32, "--learning-rate", 1e-3, "--shard"]
    options += ["--batch", 1, "--gradient-accumulation", 2, "--steps", STEPS, "--samples", 0, "--save-every", 2]
    arguments = [folder / "drawings", "--out", out, *options]
    command = [*launch(2), ROOT / "scripts/finetune.py", *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(list(map(str, command)), env=environment(), **quiet) as process:
        while not (out / "state.pt").exists():
            assert process.poll() is None
            time.sleep(0.01)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        assert process.wait(60) != 0
    assert read_state(out)["step"] < STEPS
    assert "4 a step, 2 processes on cpu" in finetune(arguments, 2).stdout
    assert_same(read_state(folder / "2" / "lora, in shards, accumulated"), read_state(out))
