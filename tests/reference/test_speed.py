"""The benchmark runs, and the outputs that it compares are equal; speed is not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "scripts" / "benchmark"


def benchmark(tmp_path, *options, **environment):
    tiny = ["--tiny", "--work", tmp_path, "--rounds", "2", "--size", "64", "--steps", "4", "--threads", "1"]
    return subprocess.run(
        [sys.executable, BENCHMARK, *tiny, *options],
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
    report = json.loads((tmp_path / "out.json").read_text())
    names = [result["case"].split(",")[0] for result in report["results"]]
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
    for result in report["results"]:
        assert len(result["imvar"]) == len(result["diffusers"]) == 2
        assert min(result["imvar"] + result["diffusers"]) > 0
    for result in report["results"][:-1]:
        limit = 1 / 255 if "pipeline" in result["case"] else 1e-4
        assert result["difference"] <= limit  # relative to the largest value; uint8 images may differ by one level
    assert report["environment"]["threads"] == 1
    assert (tmp_path / "out.md").read_text() == printed.removesuffix("\n")


def test_both_libraries_compiled(tmp_path):
    """Without the compiler's own work, which takes minutes."""
    benchmark(
        tmp_path,
        "unet",
        "vae",
        "pipeline",
        "--compile",
        "--reference",
        "compiled",
        "--json",
        tmp_path / "out.json",
        TORCHDYNAMO_DISABLE="1",
    )
    report = json.loads((tmp_path / "out.json").read_text())
    assert all(result["difference"] <= 1e-4 for result in report["results"][:2])
    assert report["environment"]["imvar mode"] == report["environment"]["diffusers mode"] == "compiled, max-autotune"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_profile(tmp_path, dtype):
    """The tables cover every kind of layer, and the rows add up to the total."""
    printed = benchmark(tmp_path, "profile", "--dtype", dtype)
    tables = [
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines()[2:] if "|" in line]
        for part in printed.split("\n\n")
    ]
    assert len(tables) == 2
    for *parts, whole in tables:
        assert abs(sum(float(row[1]) for row in parts) - float(whole[1])) <= 0.01
        assert {"linear layers", "convolution", "attention", "norms, SiLU", "the rest"} <= {row[0] for row in parts}


def test_the_cost_of_regions(tmp_path):
    """A ratio for each pair of steps: their median is between the lowest and the highest."""
    row = benchmark(tmp_path, "regions").splitlines()[2]
    median, lowest, highest = (float(cell) for cell in row.split("|")[4:7])
    assert 0 < lowest <= median <= highest


@pytest.mark.parametrize("options", [["nonsense"], ["unet", "--dtype", "int8"]])
def test_unknown_options_are_refused(options):
    result = subprocess.run([sys.executable, BENCHMARK, *options], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "invalid choice" in result.stderr
