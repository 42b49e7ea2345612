"""The benchmark runs, and what it compares is equal; how fast is for it to say, not for a test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "scripts" / "benchmark"


def test_a_tiny_benchmark(tmp_path):
    options = ["--tiny", "--work", tmp_path, "--rounds", "2", "--size", "64", "--steps", "2", "--threads", "1"]
    done = subprocess.run([sys.executable, BENCHMARK, "unet", "vae", "clip", "pipeline", "load", *options,
                           "--json", tmp_path / "out.json", "--markdown", tmp_path / "out.md", "--keep-memory"],
                          capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "out.json").read_text())
    assert [result["case"].split(",")[0] for result in found["results"]] == ["unet", "vae", "clip", "pipeline", "load"]
    for result in found["results"][:-1]:
        assert len(result["ours"]) == len(result["theirs"]) == 2
        assert min(result["ours"] + result["theirs"]) > 0
        assert result["difference"] <= 1e-4  # of the largest value
    assert found["about"]["threads"] == 1
    assert (tmp_path / "out.md").read_text() == done.stdout.removesuffix("\n")


@pytest.mark.parametrize("wrong", [["nonsense"], ["unet", "--dtype", "int8"]])
def test_what_it_does_not_know(wrong):
    done = subprocess.run([sys.executable, BENCHMARK, *wrong], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice" in done.stderr
