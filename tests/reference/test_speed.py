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


def rows_of(printed):
    """The cells of a table, with its header and the line below."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]


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
        if part.startswith("|")
    ]
    assert len(tables) == 2
    for *parts, whole in tables:
        assert abs(sum(float(row[1]) for row in parts) - float(whole[1])) <= 0.01
        assert {"linear layers", "convolution", "attention", "norms, SiLU", "the rest"} <= {row[0] for row in parts}


def test_the_cost_of_regions(tmp_path):
    """A ratio for each pair of steps: their median is between the lowest and the highest."""
    *_, row = rows_of(benchmark(tmp_path, "regions"))
    median, lowest, highest = map(float, row[3:])
    assert 0 < lowest <= median <= highest


def test_several_dtypes_and_a_busy_process(tmp_path):
    """A row for each dtype, and another of rounds beside a busy process."""
    _, _, *rows = rows_of(benchmark(tmp_path, "unet", "--dtype", "fp32,bf16", "--busy"))
    step = "unet, guided step, 1 x 64 px"
    both = step, f"{step}, beside a busy process"
    assert [tuple(row[:2]) for row in rows] == [(name, dtype) for dtype in ("fp32", "bf16") for name in both]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_the_memory_of_one_image(tmp_path):
    """Processes of both libraries, with a peak that is not below what is loaded."""
    _, _, *rows = rows_of(benchmark(tmp_path, "memory", "--steps", "1"))
    assert [row[0].split(",")[0] for row in rows] == ["diffusers", "imvar", "imvar"]
    for loaded, peak, above, resident in ((float(cell.removesuffix(" GB")) for cell in row[2:]) for row in rows):
        assert 0.05 < loaded <= peak < resident
        assert above == pytest.approx(peak - loaded, abs=0.011)  # of rounded figures


REFUSALS = {
    ("nonsense",): "invalid choice: 'nonsense'",
    ("unet", "--dtype", "int8"): "invalid choice: 'int8'",
    ("unet", "clip", "--rival", "openvino"): "--rival: expected the cases unet and vae",
    ("unet", "memory"): "alone, got unet memory",
    ("memory", "--json", "out.json"): "--json: expected cases",
}
ATTEMPTS = """
import json, runpy, sys
for options in json.loads(sys.argv[2]):
    arguments, sys.argv = sys.argv, [sys.argv[1], *options]
    try:
        runpy.run_path(arguments[1], run_name="__main__")
    except SystemExit as end:
        print("status", end.code, file=sys.stderr)
    sys.argv = arguments
"""


def test_wrong_options_are_refused():
    """All in one process, since their imports take longest."""
    command = [sys.executable, "-c", ATTEMPTS, BENCHMARK, json.dumps(list(REFUSALS))]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    *refusals, _ = printed.split("status 2\n")
    for message, refusal in zip(REFUSALS.values(), refusals, strict=True):
        assert message in refusal
