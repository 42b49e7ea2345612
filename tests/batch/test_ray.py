"""`imvar batch run --engine ray`, on a cluster of this machine; scripts/kill_ray.py loses more."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter

import pytest

if sys.platform != "linux":
    pytest.skip("needs /proc", allow_module_level=True)

from kill_batch import Bench
from kill_ray import ROWS, RayRound

from imvar import batch, bundled_examples
from imvar.cli import main
from imvar.errors import InputError
from tests.support.ray_cluster import ENVIRONMENT, RayCluster
from tests.support.wheel import ROOT

TIMEOUT = 300  # seconds
OPTIONS = ("--checkpoint", "imvar-emoji", "--steps", "2", "-n", "1", "--shard", "1")
WAITING = """
import os, sys, time

def hook(event, args):
    if event == "open" and isinstance(args[0], (str, os.PathLike)):
        if os.path.dirname(os.fspath(args[0])) == os.environ["PHOTOS"]:
            os.write(log, f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n".encode())
            while not os.path.exists(os.environ["PHOTOS"] + ".go"):
                time.sleep(0.1)

if any(word == "join" or "default_worker" in word for word in sys.orig_argv):
    log = os.open(os.environ["PHOTOS"] + ".log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    sys.addaudithook(hook)
"""
"""A sitecustomize.py: workers write down which GPUs they see, and wait at their first photo."""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("ray"), photos=6, shard=1)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, path in list(bundled_examples().items())[:4]:
        shutil.copy(path, folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("row", ["node lost", "cluster lost", "terminated"])
def test_row(bench, row):
    with RayRound(bench, "files", random.Random(row)) as r:
        ROWS[row](r)


def visible_gpus(photos, workers, options):
    """Return how many workers of `imvar batch run` see which GPUs."""
    log, go = photos.with_name("photos.log"), photos.with_name("photos.go")
    command = [sys.executable, "-m", "imvar", "batch", "run", photos, "-o", photos.with_name("out"), *OPTIONS, *options]
    path = os.pathsep.join([str(photos.with_name("hooks")), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "PHOTOS": str(photos)}
    photos.with_name("hooks").mkdir()
    photos.with_name("hooks").joinpath("sitecustomize.py").write_text(WAITING)
    errors = photos.with_name("errors")
    end = time.monotonic() + TIMEOUT
    with errors.open("wb") as file:
        driver = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        while driver.poll() is None and time.monotonic() < end:
            lines = set(log.read_text().splitlines()) if log.exists() else set()
            if len(lines) == workers:
                go.touch()
            time.sleep(0.1)
        assert driver.poll() == 0, errors.read_text()
    finally:
        go.touch()
        driver.kill()
        driver.wait()
    return Counter(line.split()[1] for line in lines)


def test_gpus_of_local_workers(photos):
    assert visible_gpus(photos, 3, ["--gpus", "0,1", "-j", "3"]) == {"0": 2, "1": 1}


def test_shares_of_gpus(photos):
    """Of a node that is said to have two."""
    hooks = {"PYTHONPATH": f"{photos.with_name('hooks')}{os.pathsep}{ROOT}", "PHOTOS": str(photos)}
    with RayCluster(hooks) as cluster:
        cluster.add_node("head", cpus=8, gpus=2)
        options = ["--engine", "ray", "--address", cluster.address, "--gpus-per-worker", "0.5"]
        assert visible_gpus(photos, 4, options) == {"0": 2, "1": 2}


# ---- errors


def test_another_environment(photos, capfd):
    """An actor's error ends the command with its message and exit status, as that of a local worker."""
    out = photos.with_name("out")
    batch.pipeline_of(batch.plan(photos, out, checkpoint="imvar-emoji", steps=2, n=1, shard=1))
    path = out / "plan" / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"versions": {"torch": "2.0"}}))
    assert main(["batch", "run", str(photos), "-o", str(out), *OPTIONS, "--engine", "ray"]) == 2
    assert "2.0" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--address", "auto"], "address"),
        (["--gpus-per-worker", "0.5"], "gpus_per_worker"),
        (["--engine", "ray", "--gpus", "0"], "gpus"),
        (["--engine", "ray", "--address", "127.0.0.1:1"], "address"),
    ],
)
def test_options_that_do_not_fit(photos, options, name, capsys):
    assert main(["batch", "run", str(photos), "-o", str(photos.with_name("out")), *OPTIONS, *options]) == 2
    assert capsys.readouterr().err.startswith(f"imvar: {name}: expected ")


@pytest.mark.parametrize("engine", ["ray", "spark"])
def test_engines_that_are_not_there(photos, engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    out = photos.with_name("out")
    expected = {"ray": r"the package ray, got none; pip install 'imvar\[batch\]'", "spark": "local or ray, got 'spark'"}
    with pytest.raises(InputError, match=f"^engine: expected {expected[engine]}$"):
        batch.run([photos], out, "imvar-emoji", engine=engine)
    assert not out.exists()
