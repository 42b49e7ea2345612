"""The sdist and the wheel of this checkout, built once for all workers of a test run, and installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
NOT_SOURCE = (".*", "out", "build", "dist", "shared", "*.egg-info", "__pycache__")


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Run a command apart from this checkout, with `env` added to the environment, and return what it printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    process = subprocess.run(command, cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, f"{command} in {cwd}:\n{process.stdout}{process.stderr}"
    return process.stdout + process.stderr


def copy_source(folder: Path) -> Path:
    """Return a copy of the checkout, so that building leaves nothing in it and finds nothing left there."""
    return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_SOURCE))


def build(source: Path, folder: Path) -> str:
    """Build an sdist in `folder`, and a wheel from it, by the setuptools of this environment. Return the log."""
    return run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel in a new environment that finds its dependencies in this one. Return its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)  # before it finds an imvar in this environment
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth files are not followed
    return python


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder shared by all workers, which the first that asks for it fills by `make`."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # that of the run
    folder = shared / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sdist, the wheel, build.log, and the source that they were built from."""

    def make(folder: Path) -> None:
        (folder / "build.log").write_text(build(copy_source(folder / "source"), folder))

    return once(tmp_path_factory, "distributions", make)


@pytest.fixture(scope="session")
def installed_python(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the installed wheel, for which `run` is meant."""
    (wheel,) = distributions.glob("*.whl")
    return once(tmp_path_factory, "installed", lambda folder: install(wheel, folder)) / "bin" / "python"
