"""Threads of the command in a process of its own: few, and without spinning."""

import json
import os
import subprocess
import sys

import pytest

from imvar.records.files import read_record

INHERITED = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}


def imvar(*args, **variables):
    command = [sys.executable, "-m", "imvar", *args]
    return subprocess.run(command, env=INHERITED | variables, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("variables", "threads"), [({}, 1), ({"OMP_NUM_THREADS": "2"}, 2)])
def test_the_bundled_model_runs_on_one_thread_by_default(tmp_path, variables, threads):
    imvar("vary", "--checkpoint", "imvar-emoji", "-n", "1", "--steps", "1", "-o", str(tmp_path), **variables)
    assert read_record(tmp_path / "fox-noto-0.png")["machine"]["threads"] == threads


@pytest.mark.parametrize(("variables", "policy"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_threads_wait_without_spinning_by_default(variables, policy):
    assert json.loads(imvar("env", "--json", **variables))["variables"]["OMP_WAIT_POLICY"] == policy
