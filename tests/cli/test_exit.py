"""How the command line ends: when nobody reads its output, on Ctrl-C, and with names that the locale lacks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from imvar import cli
from imvar.cli import env
from imvar.records.files import save_image
from tests.support.records import hand_made

ROOT = Path(__file__).parents[2]
ENV = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}
VARY = ["vary", "--checkpoint", "imvar-emoji", "fox-0.png", "--steps", "1", "-n", "1", "-q", "--json", "-o", "out"]
IMVAR = [sys.executable, "-m", "imvar"]


@pytest.mark.parametrize("args", [["vary", "--help"], ["convert", "imvar-emoji", "out", "--dry-run"]])
def test_it_ends_quietly_when_nobody_reads(args, tmp_path):
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run([*IMVAR, *args], cwd=tmp_path, env=ENV, stdout=theirs, stderr=subprocess.PIPE, check=False)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_is_one_line():
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*IMVAR, "--help"], env=ENV, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "imvar: standard output: No space left on device\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("args", [VARY, ["info", "fox-0.png"]], ids=["vary", "info"])
def test_a_full_disk_behind_the_output_of_a_command(args, unbuffered, tmp_path):
    save_image(Image.new("RGB", (8, 8)), tmp_path / "fox-0.png", hand_made())
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*IMVAR, *args],
            cwd=tmp_path,
            env=ENV | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "imvar: standard output: No space left on device\n")


def test_interrupted(monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "environment", stop)
    assert cli.main(["env"]) == 130
    assert capsys.readouterr().err == "imvar: interrupted\n"


def test_names_beyond_the_locale_are_readable(tmp_path):
    """Where Python decodes file names as ASCII, their bytes are printed as they are."""
    env = ENV | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    args = ["convert", "imvar-emoji", "лиса.safetensors", "--to", "original", "--dry-run"]
    done = subprocess.run([*IMVAR, *args], cwd=tmp_path, env=env, capture_output=True, check=True)
    assert "target: лиса.safetensors, a single file".encode() in done.stdout
