"""The scripts start, and their smallest jobs run."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(script, *options):
    command = [sys.executable, SCRIPTS / script, *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


@pytest.mark.parametrize(
    "script",
    [
        "benchmark_convert.py",
        "evaluate_approximations.py",
        "evaluate_emoji.py",
        "fit_preview.py",
        "gallery.py",
        "mutation_test.py",
        "soak.py",
        "train_emoji",
        "verify_reference.py",
    ],
)
def test_help(script):
    assert "usage:" in run(script, "--help")


def test_fuzzing_in_child_processes():
    assert "4 cases in " in run("fuzz", "--cases", "4", "--workers", "1")
