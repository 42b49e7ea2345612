"""The scripts start, and their smallest jobs run."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from count_operators import count_reference_step, count_run, count_step
from sampler_figure import SAMPLERS

SVG = "{http://www.w3.org/2000/svg}"
SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(*command):
    command = [sys.executable, *command]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


HELP = """
import runpy, sys
path = sys.path[1:]
for script in sys.argv[1:]:
    sys.path[:], sys.argv = [script.rpartition("/")[0], *path], [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code
    print("end of", script)
"""


def test_help():
    """Of each script as a program, in one process, since their imports take longest."""
    names = [
        "benchmark_batch.py",
        "benchmark_convert.py",
        "benchmark_serve.py",
        "count_operators.py",
        "evaluate_approximations.py",
        "evaluate_emoji.py",
        "evaluate_finetune.py",
        "fit_preview.py",
        "gallery.py",
        "kill_batch.py",
        "kill_ray.py",
        "mutation_test.py",
        "sampler_figure.py",
        "serve.py",
        "train_emoji",
        "verify_reference.py",
    ]
    *texts, _ = run("-c", HELP, *(SCRIPTS / name for name in names)).split("end of ")
    assert len(texts) == len(names)
    assert all("usage:" in text for text in texts)
    assert "usage:" in run(SCRIPTS / "soak.py", "--help")  # starts itself again


def test_the_figure_of_the_samplers(tmp_path):
    """It continues with what a stopped run has left, and draws a line for each sampler, labels apart."""
    options = ["--out", tmp_path, "-n", "1", "--steps", "1", "2", "--reference-steps", "3"]
    table = run(SCRIPTS / "sampler_figure.py", *options)
    distances = json.loads((tmp_path / "distances.json").read_text())
    assert len(table.splitlines()) == len(SAMPLERS) + 2
    assert all(0 < value < 100 for values in distances.values() for value in values.values())
    svg = ElementTree.fromstring((tmp_path / "samplers.svg").read_text())
    names = {label.text.rpartition(",")[0]: float(label.get("y")) for label in svg.iter(f"{SVG}text") if label.text}
    assert set(SAMPLERS) <= names.keys()
    assert len(list(svg.iter(f"{SVG}polyline"))) == len(SAMPLERS)
    heights = sorted(names[name] for name in SAMPLERS)
    assert all(b - a >= 16 for a, b in itertools.pairwise(heights))
    distances["DDIM"]["2"] = 12.34
    (tmp_path / "distances.json").write_text(json.dumps(distances))
    assert "12.34" in run(SCRIPTS / "sampler_figure.py", *options)


@torch.no_grad()
def test_a_step_dispatches_fewer_operators_than_in_diffusers():
    """Of the UNet of full size, with the same convolutions."""
    own, reference = count_step(), count_reference_step()
    assert own.others["aten.convolution"] == reference.others["aten.convolution"]
    assert own.others.total() < 0.7 * reference.others.total()
    run = count_run(images=4, steps=20)
    assert (run.views + run.others).total() < 15_000  # about half of what it was when they were first counted


def test_fuzzing_in_child_processes():
    assert "4 cases in " in run(SCRIPTS / "fuzz", "--cases", "4", "--workers", "1")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_the_benchmark_of_batches():
    sizes = {"rounds": 1, "inputs": 1, "workers": 1, "calls": 1, "sleep": 0, "files": 3, "markers": 3, "items": 1000}
    table = run(SCRIPTS / "benchmark_batch.py", *(f"--{name}={value}" for name, value in sizes.items()))
    names = ["more in a batch, 64 px", "1 worker", "plan of 3 files", "all checked", "run again until done"]
    assert all(f"| {name}" in table for name in names)
