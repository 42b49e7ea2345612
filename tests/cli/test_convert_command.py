"""The command line of `weights_convert.py`: exit status, report and errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import weights_convert
from imvar import StableDiffusionImageVariationPipeline


def test_the_command_line(small, checkpoint, tmp_path, capsys):
    target = tmp_path / "out"
    assert (
        weights_convert.main([str(small), str(target), "--fill", str(checkpoint), "--dtype", "fp16", "--verify"]) == 0
    )
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"source: {small}, a single file in the original layout"
    assert out[-1] == "verified: the new files were read back and are identical, bit for bit"
    pipe = StableDiffusionImageVariationPipeline.from_pretrained(target, dtype="auto")
    assert {model.dtype for model in pipe.modules.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["{small}"], 2, "TARGET"),
        (["{small}", "{out}", "--dtype", "int8"], 2, "--dtype"),
        (["{small}", "{out}", "--part", "scheduler"], 2, "--part"),
        (["{small}", "{out}", "--to", "comfy"], 2, "--to"),
        (["{out}/nowhere", "{out}"], 1, "nothing at this path"),
        (["{small}", "{out}", "--ema", "yes"], 1, "expected a moving average (EMA)"),
        (["{small}", "{out}", "--to", "original"], 2, "target: expected a .safetensors file"),
        (["{small}", "{out}.safetensors"], 2, "--to original) writes one file"),
        (["{small}", "{out}", "--max-shard-size", "much"], 2, "max_shard_size"),
        (
            ["{small}", "{out}", "--part", "safety_checker"],
            1,
            "expected tensors of the safety_checker, got those of unet",
        ),
        (["{small}", "{out}", "--fill", "{out}/nowhere"], 1, "nothing at this path"),
        (["{small}", "{out}", "--config", "{out}/nowhere"], 1, "nowhere"),
        (["{checkpoint}", "{out}", "--ema", "no"], 2, "ema: expected 'auto' for a folder"),
        (
            ["{checkpoint}/safety_checker", "{out}.safetensors", "--to", "original"],
            2,
            "to: expected a layout with a place for the safety_checker",
        ),
    ],
)
def test_misuse_and_failures_are_reported_in_one_line(small, checkpoint, tmp_path, capsys, args, status, words):
    paths = {"small": small, "checkpoint": checkpoint, "out": tmp_path / "out"}
    try:
        returned = weights_convert.main([arg.format(**paths) for arg in args])
    except SystemExit as error:
        returned = error.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert (returned, words in lines[-1]) == (status, True), lines
    assert len(lines) == 1 or lines[0].startswith("usage:")
    assert not list(tmp_path.iterdir())


def test_as_a_script(small, tmp_path):
    script = Path(weights_convert.__file__)
    done = subprocess.run(
        [sys.executable, script, small, tmp_path / "out", "--dry-run"], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "dry run: nothing was written"
    assert not list(tmp_path.iterdir())


def test_an_existing_target_is_said_before_it_is_replaced(small, checkpoint, tmp_path, capsys):
    target, file = tmp_path / "out", tmp_path / "out.safetensors"
    args = [str(small), str(target), "--fill", str(checkpoint)]
    assert weights_convert.main(args) == 0
    assert "replaced:" not in capsys.readouterr().out
    (target / "notes.txt").touch()
    expected = (
        f"replaced: vae, image_encoder, unet, scheduler, safety_checker, feature_extractor in the existing {target}"
    )
    for more in ["--dry-run"], []:
        assert weights_convert.main([*args, *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        (said,) = (k for k, line in enumerate(lines) if line == f"{expected}; its other files stay")
        assert said < next((k for k, line in enumerate(lines) if line.startswith("wrote")), len(lines))
    assert (target / "notes.txt").exists()
    for said in False, True:
        assert weights_convert.main([str(small), str(file), "--to", "original"]) == 0
        assert (f"replaced: the existing file {file}" in capsys.readouterr().out.splitlines()) == said
