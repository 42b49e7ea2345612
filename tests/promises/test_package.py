"""The wheel and the sdist are complete, and work where there is no checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.wheel import ROOT, run


@pytest.fixture(scope="session")
def wheel(distributions):
    (path,) = distributions.glob("*.whl")
    return path


def test_building_warns_of_nothing_absent(distributions):
    assert "absent" not in (distributions / "build.log").read_text()


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel):
    """Not the gallery of the README, which is an image of a megabyte."""
    source = {path for path in (ROOT / "imvar").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {path.relative_to(ROOT).as_posix() for path in source}


def test_check_wheel_contents(wheel):
    subprocess.run([sys.executable, "-m", "check_wheel_contents", wheel], check=True)


def test_variations_from_the_wheel(installed_python, tmp_path):
    """In an empty folder, with an empty home."""
    imvar = installed_python.parent / "imvar"
    home = {"HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "home").mkdir()
    (tmp_path / "empty").mkdir()
    where = run(installed_python, "-c", "import imvar; print(imvar.__file__)", cwd=tmp_path / "empty", **home)
    assert installed_python.parents[1] in Path(where.strip()).parents
    assert run(imvar, "--version", cwd=tmp_path / "empty", **home) == "imvar 0.1.0\n"
    run(imvar, "vary", "--checkpoint", "imvar-emoji", "-n", "1", "--steps", "1", cwd=tmp_path / "empty", **home)
    assert len(list((tmp_path / "empty" / "variations").glob("*.png"))) == 13
    assert not list((tmp_path / "home").iterdir())
