"""A run of `scripts/finetune.py` that was killed and continued equals one that was not, bit for bit."""

import io
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from finetune import main
from finetuning import loop, state
from finetuning.state import Run, read_state
from finetuning.trainable import MovingAverage
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.trainings import assert_same, write_drawings
from tests.support.wheel import once

OPTIONS = ["--checkpoint", "imvar-emoji", "--resolution", "32", "--batch", "2", "--cpu", "--samples", "0"]
OPTIONS += ["--learning-rate", "1e-3", "--warmup-steps", "4", "--save-every", "2", "--log-every", "1", "--workers", "0"]
STAGES = {"lora": ["--stage", "lora", "--gradient-accumulation", "2"], "unet": ["--stage", "unet"]}
EXPORTS = {"lora": "pytorch_lora_weights.safetensors", "unet": "checkpoint/unet/diffusion_pytorch_model.safetensors"}


def die(*_args, **_options):
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner, name, count, action=die):
    """Replace a function so that its call of this count, from 1, is of `action`."""
    original, calls = getattr(owner, name), []

    def function(*args, **options):
        calls.append(name)
        return (action if len(calls) == count else original)(*args, **options)

    setattr(owner, name, function)


def save_half(value, path):
    """Write half of a file and die."""
    buffer = io.BytesIO()
    torch.serialization.save(value, buffer)
    Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
    die()


DEATHS = {  # of a process that has replaced this
    "in the third backward pass": lambda: at_call(torch.Tensor, "backward", 3),
    "between optimizer and average": lambda: at_call(MovingAverage, "update", 4),
    "in the second save": lambda: at_call(state.torch, "save", 2, save_half),
    "between log and save": lambda: at_call(loop.Run, "save", 1),
}


def run(arguments, prepare=lambda: None):
    """Run `scripts/finetune.py` in a process of its own and return its exit status and what it printed.

    It is a fork of this process, so that it takes no seconds to import torch.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.dup2(write, 1)
            os.dup2(write, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = ["finetune.py", *map(str, arguments)]
            prepare()
            main()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as file:
        printed = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), printed


def log(out):
    """Return the rows of the log, without the times."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def events(out):
    """Return the scalars that TensorBoard shows, without the times."""
    accumulator = EventAccumulator(str(out / "tensorboard"))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in tags if tag != "seconds"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with drawings, and a run of eight steps of each stage that nothing interrupted."""

    def make(folder):
        write_drawings(folder / "drawings", 5)
        for stage, options in STAGES.items():
            status, printed = run([folder / "drawings", "--out", folder / stage, *OPTIONS, *options, "--steps", 8])
            assert status == 0, printed

    return once(tmp_path_factory, "uninterrupted", make)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_killed_and_continued_equals_one_that_was_not(folder, stage):
    out = folder / f"killed-{stage}"
    command = [folder / "drawings", "--out", out, *OPTIONS, *STAGES[stage], "--steps", 8]
    for death, prepare in DEATHS.items():
        status, printed = run(command, prepare)
        assert status == -signal.SIGKILL, (death, printed)
    status, printed = run(command)
    assert status == 0, printed
    assert_same(read_state(folder / stage), read_state(out))
    assert_same(load_file(folder / stage / EXPORTS[stage]), load_file(out / EXPORTS[stage]))
    assert log(folder / stage) == log(out)
    assert events(folder / stage) == events(out)
    assert [row["step"] for row in log(out)] == [*range(1, 9)]
    assert not list(out.glob(".*.tmp"))


def test_a_run_with_more_steps_equals_one_at_once(folder):
    out = folder / "more"
    command = [folder / "drawings", "--out", out, *OPTIONS, *STAGES["lora"], "--steps"]
    for steps in (4, 8):
        status, printed = run([*command, steps])
        assert status == 0, printed
    assert_same(read_state(folder / "lora"), read_state(out))
    assert log(folder / "lora") == log(out)
    assert events(folder / "lora") == events(out)


def test_another_division_of_a_step_continues_and_another_recipe_is_refused(folder, tmp_path):
    def attempt(*changed):
        out = shutil.copytree(folder / "lora", tmp_path / "out", dirs_exist_ok=True)
        before = (out / "state.pt").read_bytes()
        status, printed = run([folder / "drawings", "--out", out, *OPTIONS, *STAGES["lora"], "--steps", 8, *changed])
        assert (out / "state.pt").read_bytes() == before
        return status, printed

    assert attempt("--batch", 4, "--gradient-accumulation", 1)[0] == 0
    for changed, message in {
        ("--learning-rate", 1e-4): "expected learning_rate 0.0001, got 0.001",
        ("--batch", 4): "expected step size 8, got 4",
        ("--rank", 4): "expected rank 4, got 16",
        ("--steps", 6): "expected a run of up to 6 steps, got 8",
    }.items():
        status, printed = attempt(*changed)
        assert status == 1
        assert message in printed
    drawing = (folder / "drawings" / "00.png").read_bytes()
    try:
        shutil.copy(folder / "drawings" / "01.png", folder / "drawings" / "00.png")
        assert "expected images 5 with names and sizes of hash" in attempt()[1]
    finally:
        (folder / "drawings" / "00.png").write_bytes(drawing)


def test_a_second_run_in_a_folder_is_refused(folder):
    command = [folder / "drawings", "--out", folder / "lora", *OPTIONS, *STAGES["lora"], "--steps", 8]
    with FileLock(folder / "lora" / ".lock"):
        status, printed = run(command)
    assert status == 1
    assert "expected a folder without a run in progress" in printed


@pytest.mark.parametrize(
    ("out", "message"),
    [("drawings/00.png", "expected a folder that can be written"), ("new", "expected a multiple of 4 pixels, got 62")],
)
def test_folders_and_sizes_that_cannot_be(folder, out, message):
    status, printed = run([folder / "drawings", "--out", folder / out, *OPTIONS, "--resolution", 62])
    assert status == 1
    assert message in printed
    assert "Traceback" not in printed.partition("SystemExit")[2]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-1000], lambda data: b"no state" * 100])
def test_a_damaged_state_is_refused_and_kept(folder, tmp_path, damage):
    damaged = damage((folder / "lora" / "state.pt").read_bytes())
    (tmp_path / "state.pt").write_bytes(damaged)
    run = Run(None, {}, None, None, {})
    with pytest.raises(SystemExit, match=r"state\.pt: expected the state of a run, got .*; delete it"):
        run.resume(tmp_path)
    assert (tmp_path / "state.pt").read_bytes() == damaged


def test_a_state_of_something_else_is_refused(tmp_path):
    torch.save({"step": 3}, tmp_path / "state.pt")
    with pytest.raises(SystemExit, match=r"state\.pt: expected the state of a run"):
        read_state(tmp_path)
