"""What commands print: paths and JSON on stdout; notes and, on a terminal, progress on stderr."""

import fcntl
import io
import json
import os
import re
import struct
import subprocess
import sys
import termios

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from PIL import Image

import imvar
from imvar.cli import printer, render


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_no_terminal_no_bars(run, photo, capsys):
    assert run(photo, "-n", 2) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.rsplit("/")[-1] for line in out.splitlines()] == [
        "a photo-0.png",
        "a photo-1.png",
        "contact-sheet.png (the photos with their variations)",
    ]


def test_quiet_prints_errors_alone(run, tmp_path, capsys, monkeypatch):
    frames = [Image.new("RGB", (40, 24), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert run(tmp_path / "two.gif", "-n", 1) == 0
    note = f"imvar: {tmp_path / 'two.gif'}: of several frames or pages only the first is used\n"
    assert capsys.readouterr().err == note
    enable_progress_bars()  # the tests in reference/ disable all bars of huggingface_hub
    downloads = []
    load = render.load_pipeline
    monkeypatch.setattr(
        render, "load_pipeline", lambda *args: downloads.append(are_progress_bars_disabled()) or load(*args)
    )
    assert run(tmp_path / "two.gif", "-n", 1, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert (downloads, are_progress_bars_disabled()) == ([True], False)
    assert run("nowhere.png", "-q") == 1
    assert capsys.readouterr().err.startswith("imvar: nowhere.png")


def test_json_has_an_object_for_each_image(run, photo, tmp_path, capsys, monkeypatch):
    def check(self, images, clip_input):
        return images, [False, True]

    monkeypatch.setattr(imvar.StableDiffusionSafetyChecker, "forward", check)
    assert run(photo, "-n", 2, "--seed", 5, "--json") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    out = tmp_path / "out"
    assert {name: first[name] for name in ("path", "seed", "source", "flagged", "sheet")} == {
        "path": str(out / "a photo-5.png"),
        "seed": 5,
        "source": str(photo),
        "flagged": False,
        "sheet": str(out / "contact-sheet.png"),
    }
    assert (second["path"], second["flagged"]) == (str(out / "a photo-6.png"), True)
    assert run(photo, "-n", 2, "--seed", 5, "--json", "-q") == 0
    third = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (third["path"], third["sheet"]) == (str(out / "a photo-5-2.png"), str(out / "contact-sheet-2.png"))
    assert all(os.path.exists(third[name]) for name in ("path", "sheet"))


@pytest.mark.parametrize("variables", [{}, {"TQDM_DISABLE": "1"}], ids=str)
def test_a_line_for_the_whole_over_the_bar_of_the_image(variables):
    """In a process, as tqdm reads its variables when it is imported."""
    code = "import sys; from tests.cli.test_progress import show; show()"
    environment = os.environ | {"TQDM_MININTERVAL": "0"} | variables
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert ("1/3 images  50%" in result.stdout) == ("fox: 100%" in result.stdout) == (not variables)


def show():
    """Print what a terminal gets of two calls."""
    stderr, sys.stderr = sys.stderr, Terminal()
    with printer.Printer() as progress:
        progress.expect(3, 2)
        with progress.call_bar("fox", 1, 4) as bar:
            bar.update(4)
        progress.image("fox-0.png", "", {"flagged": False})
        with progress.call_bar("panda", 2, 4) as bar:
            bar.update(1)
    print(sys.stderr.getvalue())
    sys.stderr = stderr


def on_a_terminal(args, width, **variables):
    """Run `imvar` on a pseudo-terminal and return the lines that it wrote."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    command = [sys.executable, "-m", "imvar", *map(str, args)]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | variables)
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 2**16):
            written += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return re.split(r"[\r\n]+", written.decode().replace("\x1b[A", ""))


def test_a_narrow_terminal_in_the_c_locale(photo, tmp_path):
    name = "a photo with a name that is longer than the terminal is wide \N{FOX FACE}.jpg"
    photo.rename(tmp_path / name)
    args = ["vary", tmp_path / name, "--checkpoint", "imvar-emoji", "-n", 2, "--batch", 1, "--steps", 2]
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TQDM_MININTERVAL": "0"}
    lines = on_a_terminal([*args, "-o", tmp_path / "out"], 60, **variables)
    bars = [line for line in lines if "%|" in line]
    assert any(line.startswith("1/2 images  50%|") for line in bars)
    assert any(line.startswith("a photo with a ...") for line in bars)
    assert all(len(line) < 60 and line.isascii() for line in bars)
    assert "\x1b" not in "".join(lines)  # no colours
    assert not lines[-1].strip()  # the bars are gone
