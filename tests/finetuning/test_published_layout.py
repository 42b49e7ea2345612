"""A checkpoint in the layout of the published one is trained."""

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import PHOTOS
from tests.support.published_checkpoint import write_checkpoint

SCRIPT = Path(__file__).parents[2] / "scripts" / "finetune.py"


def test_a_checkpoint_in_the_published_layout_is_trained(tmp_path):
    write_checkpoint(tmp_path / "checkpoint", tiny=True, endings=[".bin"])
    command = [sys.executable, SCRIPT, PHOTOS, "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "out"]
    command += [
        "--stage",
        "cross-attention",
        "--steps",
        "2",
        "--batch",
        "2",
        "--log-every",
        "1",
        "--cpu",
        "--samples",
        "0",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert (tmp_path / "out" / "checkpoint" / "unet").is_dir()
