"""The command line before a command runs: help, usage errors and suggestions, without any library."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from imvar import cli
from imvar.cli import completion
from imvar.cli.parser import command_parser

COMMANDS = list(command_parser().commands)
ACTIONS = [f"batch {name}" for name in command_parser().commands["batch"].commands]
RUN = ["batch", "run", "photos", "-o", "out"]
LIBRARIES = {"torch", "numpy", "PIL", "huggingface_hub", "safetensors", "einops"}


def answer(capsys, *args):
    """Return the exit status and what was printed, of a command line that ends before a command runs."""
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    printed = capsys.readouterr()
    return end.value.code, printed.out + printed.err


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--version"],
        ["--print-completion", "bash"],
        ["--help"],
        ["vary", "--chekpoint"],
        ["batch"],
        [*RUN, "--part", "2/2"],
        [*RUN, "--gpus", "0,1", "--device", "cpu"],
        *([*name.split(), "--help"] for name in COMMANDS + ACTIONS),
    ],
    ids=" ".join,
)
def test_no_library_is_loaded(args):
    command = [sys.executable, "-X", "importtime", "-m", "imvar", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if {"--version", "--help", "bash"} & set(args) else 2)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "imvar.cli.parser" in loaded
    assert not LIBRARIES & {name.partition(".")[0] for name in loaded}


@pytest.mark.parametrize("command", [None, *COMMANDS, *ACTIONS])
def test_help_fits_a_screen_and_has_an_example(command, capsys, monkeypatch):
    args = [*command.split(), "--help"] if command else ["--help"]
    monkeypatch.setenv("COLUMNS", "80")
    status, text = answer(capsys, *args)
    lines = text.splitlines()
    assert status == 0
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 80
    assert text.startswith(f"usage: imvar {command or 'COMMAND'} ")
    assert f"  imvar {command or 'vary'} " in text.partition("Example")[2]
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, answer(capsys, *args)[1].splitlines())) <= 60


def test_a_wide_terminal_gets_no_long_lines(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert max(map(len, answer(capsys, "vary", "--help")[1].splitlines())) <= 100


def test_alone_it_prints_the_short_help(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([])
    printed = capsys.readouterr()
    assert (end.value.code, printed.out) == (2, "")
    assert all(f"  {name} " in printed.err for name in COMMANDS)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["photo.jpg"], "photo.jpg is not a command; did you mean `imvar vary photo.jpg`?"),
        (["my photo.jpg", "-n", "3"], "did you mean `imvar vary 'my photo.jpg'`?"),
        ([os.curdir], "did you mean `imvar vary .`?"),
        (["varry", "photo.jpg", "--seed", "1"], "unknown command varry; did you mean `imvar vary`?"),
        (["xyz"], "unknown command xyz; see imvar --help"),
        (["--verison"], "imvar: error: unknown option --verison; did you mean --version?"),
        (["vary", "a.jpg", "--chekpoint", "b"], "imvar vary: error: unknown option --chekpoint; did you mean --checkp"),
        (["vary", "--chekpoint=b"], "unknown option --chekpoint; did you mean --checkpoint?"),
        (["grid", "a.jpg", "--rosw", "seed=1,2"], "imvar grid: error: unknown option --rosw; did you mean --rows?"),
        (["vary", "a.jpg", "--zzz"], "unknown option --zzz; see imvar vary --help"),
        (["vary", "a.jpg", "-x"], "unrecognized arguments: -x"),
        (["vary", "a.jpg", "-n", "0", "--", "--chekpoint"], "argument -n: expected an integer"),
        (["vary", "a.jpg", "-o", ""], "argument -o: expected a folder, got ''"),
        (
            ["vary", "https://me:secret@example.com/a.jpg"],
            "got the address 'https://...@example.com/a.jpg'; nothing is",
        ),
        (
            ["vary", "a.jpg", "--negative", "HTTP://x/a.jpg"],
            "argument --negative: expected the path of a file, got the",
        ),
        (["batch", "rnu", "photos"], "imvar batch: error: unknown action rnu; did you mean `imvar batch run`?"),
        (["batch", os.curdir, "-o", "out"], ". is not an action; did you mean `imvar batch run .`?"),
        (["batch", "photos.tar"], "did you mean `imvar batch run photos.tar`?"),
        (
            ["batch", "status", "out", "--wacht"],
            "imvar batch status: error: unknown option --wacht; did you mean --",
        ),
        (["batch", "run", "photos"], "imvar batch run: error: the following arguments are required: -o"),
        ([*RUN, "--part", "3/2"], "--part: expected I/N with I from 0 to N - 1, such as 0/4, got '3/2'"),
        (["batch", "join", "out", "--part", "1"], "imvar batch join: error: argument --part: expected I/N with"),
        ([*RUN, "--gpus", "0;1"], "argument --gpus: expected numbers of GPUs such as 0,1, or all, got '0;1'"),
        ([*RUN, "--gpus", "0,"], "argument --gpus: expected numbers of GPUs"),
        ([*RUN, "--gpus", "all", "--device", "cuda:1"], "--gpus: expected --device cuda or auto with it, got cuda:1"),
        ([*RUN, "--max-errors", "5"], "argument --max-errors: expected a number from 0 to 1, got '5'"),
        ([*RUN, "-j", "0"], "argument -j: expected an integer from 1 to 1000000, got '0'"),
        ([*RUN, "--strength", "0.5"], "imvar batch run: error: --strength: expected --init with it, got none"),
        (["mix", "http://x/a.jpg=1"], "argument PHOTO=WEIGHT: expected the path of a file, got the address"),
    ],
)
def test_usage_errors_suggest_what_may_have_been_meant(args, message, capsys):
    status, text = answer(capsys, *args)
    assert status == 2
    assert message in text.splitlines()[-1]
    assert "secret" not in text


def test_an_abbreviated_option_is_not_unknown(capsys):
    assert "argument -n" in answer(capsys, "vary", "a.jpg", "--guid", "2", "-n", "x")[1]


def test_the_page_without_its_extra(tmp_path):
    (tmp_path / "fastapi.py").write_text("raise ModuleNotFoundError(\"No module named 'fastapi'\")")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parents[2])])}
    done = subprocess.run([sys.executable, "-m", "imvar", "web"], env=env, capture_output=True, text=True, check=False)
    found = "web: expected the packages fastapi, gradio and uvicorn, got the error \"No module named 'fastapi'\""
    hint = "pip install 'imvar[web]', in a checkout pip install '.[web]'"
    assert (done.returncode, done.stderr) == (1, f"imvar: {found}; {hint}\n")


# ---- Completion

BASH = """
eval "$("$PYTHON" -m imvar --print-completion bash)"
complete -p imvar
for line; do
    COMP_WORDS=($line)
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _shtab_imvar
    echo "${COMPREPLY[@]}"
done
"""


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_commands_options_choices_and_files(tmp_path):
    (tmp_path / "fox.png").touch()
    (tmp_path / "foxes").mkdir()
    lines = {
        "imvar interp": "interpolate",
        "imvar vary --checkp": "--checkpoint",
        "imvar vary --scheduler eul": "euler euler-ancestral",
        "imvar vary -o fo": "foxes",
        "imvar vary fox.p": "fox.png",
        "imvar interpolate a.png fox.p": "fox.png",
        "imvar vary a.png --mask fox.p": "fox.png",
        "imvar vary --checkpoint foxe": "foxes",
        "imvar batch ver": "verify",
        "imvar batch run --max": "--max-errors",
        "imvar batch run fox.p": "fox.png",
        "imvar batch run fox.png -o fo": "foxes",
        "imvar batch status fo": "foxes",
        "imvar batch extend foxes fox.p": "fox.png",
    }
    env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run(["bash", "-c", BASH, "bash", *lines], cwd=tmp_path, env=env, capture_output=True, text=True)
    registered, *completed = done.stdout.splitlines()
    assert registered.endswith("-F _shtab_imvar imvar"), done.stderr
    assert dict(zip(lines, completed, strict=True)) == lines


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_each_shell_gets_a_script_with_all_commands(shell, capsys):
    status, script = answer(capsys, "--print-completion", shell)
    assert status == 0
    assert all(name in script for name in COMMANDS)


def test_completion_without_shtab(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    status, text = answer(capsys, "--print-completion", "bash")
    assert status == 2
    assert "pip install 'imvar[completion]'" in text
