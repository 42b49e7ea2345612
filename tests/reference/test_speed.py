"""The benchmark runs, and the outputs that it compares are equal; speed is not tested."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark import precision
from benchmark.__main__ import arguments, compare_libraries
from benchmark.cases import CASES
from benchmark.gpu_kernels import Candidate, cells_of, kernels_table
from benchmark.gpu_profile import Kernel, kernels_in, profile_rows
from benchmark.precision import precision_table
from torch.autograd import DeviceType
from torch.autograd.profiler_util import Interval

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
        "max-autotune",
        "--reference",
        "max-autotune",
        "--json",
        tmp_path / "out.json",
        TORCHDYNAMO_DISABLE="1",
    )
    report = json.loads((tmp_path / "out.json").read_text())
    assert all(result["difference"] <= 1e-4 for result in report["results"][:2])
    assert report["environment"]["imvar mode"] == report["environment"]["diffusers mode"] == "max-autotune"


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


def options():
    return argparse.Namespace(
        device=torch.device("cpu"), tiny=True, rounds=1, batch=1, size=32, compile="eager", reference="eager"
    )


def test_candidates_for_layers():
    """Those that exist on a CPU, in both dtypes, with an error of rounding."""
    for dtype, least, most in (torch.float32, 0, 1e-6), (torch.bfloat16, 1e-4, 2e-2):
        _, _, *rows = rows_of(kernels_table(dtype, options()))
        assert [(row[0], row[2]) for row in rows] == [
            ("attention", "default SDPA"),
            ("attention", "default SDPA, padded to 64"),
            ("group norm, SiLU", "eager, contiguous"),
            ("group norm, SiLU", "eager, channels_last"),
            ("3x3 convolution", "eager, contiguous"),
            ("3x3 convolution", "eager, channels_last"),
            ("group norm, SiLU, 3x3 convolution", "eager, contiguous"),
            ("group norm, SiLU, 3x3 convolution", "eager, channels_last"),
        ]
        assert all(least < float(row[5]) <= most for row in rows)
        assert all(float(row[3]) > 0 < float(row[4]) for row in rows)


def test_a_candidate_that_fails_is_a_row():
    def fails(x):
        raise RuntimeError("not for this layer")

    cells = cells_of(Candidate("of another layer", fails), [torch.ones(1)], torch.ones(1), options())
    assert cells == (None, "RuntimeError: not for this layer")


def broken(_):
    raise RuntimeError("no such kernel")
    yield


def test_a_case_that_fails_loses_no_other(published, monkeypatch, capsys):
    monkeypatch.setitem(CASES, "unet", broken)
    args = argparse.Namespace(**vars(options()), dtype=["fp32"], cases=["unet", "vae"], warm=0, busy=False)
    results = compare_libraries(published, args)
    assert next(results).case.startswith("vae")
    with pytest.raises(SystemExit, match="failed: unet in fp32"):
        next(results)
    assert "no such kernel" in capsys.readouterr().err


def test_a_setting_that_fails_is_a_row(published, monkeypatch):
    monkeypatch.setattr(precision, "vae", broken)
    exact = [torch.zeros(1)]
    monkeypatch.setattr(precision, "outputs_of", lambda _: exact)
    _, _, *rows = rows_of(precision_table(published, options()))
    assert len(rows) == 5
    assert all(row[7] == "RuntimeError: no such kernel" for row in rows)


def test_the_error_of_each_level(published):
    """Smaller in a wider dtype; CUDA graphs change nothing on a CPU."""
    _, _, *rows = rows_of(precision_table(published, options()))
    assert {row[0].split(",")[0] for row in rows} == {"unet", "vae"}
    steps = {tuple(row[1:4]): (float(row[7]), row[8]) for row in rows if row[0].startswith("unet")}
    for library in "diffusers", "imvar":
        wide, narrow = (steps[library, dtype, "eager"][0] for dtype in ("fp32", "bf16"))
        assert 1e-8 < wide < 1e-5 < 1e-3 < narrow < 0.1
    assert steps["imvar", "fp32", "cudagraphs"] == steps["imvar", "fp32", "eager"]
    assert steps["imvar", "fp32", "eager"][1] == "yes"


def test_kinds_of_kernels_and_idle_time():
    """Two kernels beside each other, a pause, and a third, in two runs: of their 10 microseconds 4 are idle."""
    names = "flash_fwd_kernel", "sm90_xmma_fprop_implicit_gemm_f16", "vectorized_elementwise_kernel"
    spans = (0, 4), (3, 5), (9, 10)
    events = [
        SimpleNamespace(name=name, time_range=Interval(*span), device_type=device, is_user_annotation=name == "step")
        for name, span, device in (
            *zip(names, spans, [DeviceType.CUDA] * 3, strict=True),
            ("step", (0, 10), DeviceType.CUDA),
            ("Context Sync", (0, 10), DeviceType.CUDA),
            ("aten::conv2d", (0, 10), DeviceType.CPU),
        )
    ]
    assert profile_rows(kernels_in(events), 2, 5e-6) == [
        ("attention", "0.002", "40.0 %", "0.5"),
        ("convolution", "0.001", "20.0 %", "0.5"),
        ("elementwise", "0.001", "10.0 %", "0.5"),
        ("idle", "0.002", "40.0 %", "0"),
        ("all", "0.005", "100.0 %", "1.5"),
    ]
    assert Kernel("nchwToNhwcKernel", 0, 1).kind == "layout of convolutions"
    assert Kernel("triton_red_fused_native_group_norm_silu_0", 0, 1).kind == "fused norms"
    assert Kernel("triton_poi_fused_convolution_silu_1", 0, 1).kind == "fused elementwise"


def gpu_parts(tmp_path, *parts, python, **environment):
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{python}\n")
    path.chmod(0o755)
    environment |= {"PYTHON": str(path), "OUT": str(tmp_path), "DEVICE": "cpu"}
    script = [BENCHMARK.with_name("benchmark_gpu"), *parts]
    return subprocess.run(script, capture_output=True, text=True, check=False, env=os.environ | environment)


def test_every_part_of_the_benchmark_on_a_gpu_is_a_valid_command(tmp_path, monkeypatch):
    gpu_parts(tmp_path, "all", python='echo "$@"')
    commands = [log.read_text().split() for log in sorted(tmp_path.glob("*.log"))]
    benchmarks = [command[1:] for command in commands if command[0] == "scripts/benchmark"]
    assert len(commands) == len(benchmarks) + 1 == 24
    for command in benchmarks:
        monkeypatch.setattr(sys, "argv", ["benchmark", *command])
        args = arguments()
        assert args.markdown.parent == tmp_path
        assert args.device == torch.device("cpu")


def test_a_part_that_takes_too_long_is_stopped_and_the_next_one_runs(tmp_path):
    sleep = 'case "$*" in *cudagraphs*) sleep 20;; esac'
    gpu_parts(tmp_path, "graphs", "eager", "graphs", "eager", python=sleep, SECONDS_EACH="1", SECONDS_ALL="2")
    lines = (tmp_path / "progress.txt").read_text().splitlines()
    ended = [line.split(" ", 1)[1].split(",")[0] for line in lines]
    assert ended == ["graphs status 124", "eager status 0", "graphs status 124", "no time left"]


def test_parts_are_listed_and_others_refused(tmp_path):
    listed = gpu_parts(tmp_path, python="exit 1").stdout
    refused = gpu_parts(tmp_path, "eager", "nonsense", python="exit 1")
    assert refused.returncode == 2
    assert "got nonsense" in refused.stderr
    assert refused.stderr.split("expected one of ")[1].split(", got")[0].split(", ") == [
        line.split()[0] for line in listed.splitlines() if line
    ]
    assert not (tmp_path / "progress.txt").exists()


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
    ("unet", "--dtype", "int4"): "invalid choice: 'int4'",
    ("unet", "--dtype", "int8"): "--dtype int8: expected the case unet with --rival openvino",
    ("unet", "clip", "--rival", "openvino"): "--rival: expected the cases unet and vae",
    ("unet", "memory"): "alone, got unet memory",
    ("unet", "--compile", "quick"): "--compile: invalid choice: 'quick'",
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
