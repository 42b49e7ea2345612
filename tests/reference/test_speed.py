"""The benchmark runs, and what it compares is equal; how fast is for it to say, not for a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "scripts" / "benchmark"


def benchmark(tmp_path, *options, **environment):
    small = ["--tiny", "--work", tmp_path, "--rounds", "2", "--size", "64", "--steps", "4", "--threads", "1"]
    return subprocess.run(
        [sys.executable, BENCHMARK, *small, *options],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    ).stdout


def test_a_tiny_benchmark(tmp_path):
    cases = ["unet", "vae", "clip", "safety", "pipeline", "scaling", "load"]
    printed = benchmark(
        tmp_path,
        *cases,
        "--json",
        tmp_path / "out.json",
        "--markdown",
        tmp_path / "out.md",
        "--keep-memory",
        "--largest",
        "1",
    )
    found = json.loads((tmp_path / "out.json").read_text())
    names = [result["case"].split(",")[0] for result in found["results"]]
    assert names == [
        "unet",
        "vae",
        "clip",
        "safety",
        "pipeline",
        *["unet"] * 3,
        *["pipeline"] * 3,
        "load; private memory",
    ]
    for result in found["results"]:
        assert len(result["ours"]) == len(result["theirs"]) == 2
        assert min(result["ours"] + result["theirs"]) > 0
    for result in found["results"][:-1]:
        limit = 1 / 255 if "pipeline" in result["case"] else 1e-4
        assert result["difference"] <= limit  # of the largest value; pictures may be one level apart
    assert found["about"]["threads"] == 1
    assert (tmp_path / "out.md").read_text() == printed.removesuffix("\n")


def test_both_sides_compiled(tmp_path):
    """But for the compiler's own work, which takes minutes."""
    benchmark(
        tmp_path,
        "unet",
        "vae",
        "pipeline",
        "--compile",
        "--rival",
        "compiled",
        "--json",
        tmp_path / "out.json",
        TORCHDYNAMO_DISABLE="1",
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert all(result["difference"] <= 1e-4 for result in found["results"][:2])
    assert found["about"]["imvar"] == found["about"]["rival"] == "compiled, max-autotune"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_where_the_time_goes(tmp_path, dtype):
    """The tables account for every multiplication, and the parts are the whole."""
    printed = benchmark(tmp_path, "profile", "--dtype", dtype)
    tables = [
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines()[2:] if "|" in line]
        for part in printed.split("\n\n")
    ]
    assert len(tables) == 2
    for *parts, whole in tables:
        assert abs(sum(float(row[1]) for row in parts) - float(whole[1])) <= 0.01
        assert {"linear layers", "convolution", "attention", "norms, SiLU", "the rest"} <= {row[0] for row in parts}


@pytest.mark.parametrize("wrong", [["nonsense"], ["unet", "--dtype", "int8"]])
def test_what_it_does_not_know(wrong):
    done = subprocess.run([sys.executable, BENCHMARK, *wrong], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice" in done.stderr
