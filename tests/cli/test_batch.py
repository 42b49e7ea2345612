"""`imvar batch` in processes of its own, on imvar-emoji with two steps."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("needs signals and a pseudo-terminal", allow_module_level=True)

from imvar import batch, bundled_examples, cli
from imvar.batch.worker import work
from imvar.cli.batch import use_gpu_of_rank
from tests.support.terminal import run_in_terminal

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
FAST = ("--checkpoint", "imvar-emoji", "--steps", "2")
OPTIONS = (*FAST, "-n", "2", "--shard", "1")


@pytest.fixture
def folder(tmp_path):
    """A folder with three drawings in `photos`."""
    (tmp_path / "photos").mkdir()
    for name, path in list(bundled_examples().items())[:3]:
        shutil.copy(path, tmp_path / "photos" / f"{name}.png")
    return tmp_path


def start(cwd, *args):
    """Start `imvar batch` in a folder."""
    command = [sys.executable, "-m", "imvar", "batch", *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=ENV, preexec_fn=accept_interrupts, **pipes)


def accept_interrupts():
    """Undo what a shell does for jobs in the background, as these tests may be run."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(process):
    """Return the exit status, standard output and standard error of a process, at its end."""
    out, err = process.communicate()
    return process.returncode, out, err


def imvar_batch(cwd, *args):
    return end(start(cwd, *args))


def here(capsys, *args):
    """Run `imvar batch` in this process, and return the same."""
    status = cli.main(["batch", *map(str, args)])
    return status, *capsys.readouterr()


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def images(out):
    """Return the bytes of each image, by path."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.glob("images/*/*/*")}


def test_from_a_broken_photo_to_a_larger_batch(folder, capsys):
    out, broken = folder / "out", folder / "photos" / "broken.png"
    broken.write_text("not an image")

    status, printed, errors = imvar_batch(folder, "run", "photos", "-o", "out", *OPTIONS, "-j", "2")
    assert (status, printed.startswith("4/4 shards, 6 images, 1 error: ")) == (1, True)
    assert errors == f"imvar: errors: expected at most 0.05 of 4 inputs, got 1; see {out / 'errors.jsonl'}\n"
    assert [row["id"] for row in rows(out / "errors.jsonl")] == ["broken.png"]
    first = images(out)
    assert len(first) == 6

    broken.write_bytes(bundled_examples()["fox-noto"].read_bytes())
    status, printed, errors = imvar_batch(folder, "retry", "out", "--json")
    assert (status, errors) == (0, "imvar: shards with errors, which are made again: 1\n")
    report = json.loads(printed)
    assert (report["inputs"], report["made"], report["errors"]) == (4, 8, 0)
    assert report["bytes"] == sum(map(len, images(out).values()))
    assert (out / "errors.jsonl").read_text() == ""
    assert images(out).items() > first.items()

    (folder / "more").mkdir()
    shutil.copy(broken, folder / "more" / "other.png")
    assert imvar_batch(folder, "extend", "out", "more", "-q") == (0, "", "")
    made = images(out)
    assert {row["file"] for row in rows(out / "manifest.jsonl")} == made.keys()
    assert len(made) == 10

    spoiled = next(iter(sorted(made)))
    (out / spoiled).write_bytes(made[spoiled][:-1])
    status, printed, errors = here(capsys, "verify", out)
    assert (status, printed) == (75, spoiled + "\n")
    assert errors.startswith("imvar: files: expected the bytes that were written, got 1 with other bytes or missing; ")
    assert imvar_batch(folder, "join", "out", "-q") == (0, "", "")
    assert images(out) == made
    assert here(capsys, "verify", out) == (0, "", "")
    (out / "manifest.jsonl").write_text("")
    (out / "errors.jsonl").unlink()
    assert here(capsys, "verify", out)[:2] == (75, "manifest.jsonl\nerrors.jsonl\n")
    assert here(capsys, "status", out, "--json")[1].endswith('"errors_file": null, "workers": 0}\n')
    assert here(capsys, "join", out, "-q")[0] == 0
    assert here(capsys, "verify", out) == (0, "", "")

    status, _, errors = here(capsys, "run", folder / "photos", "-o", out, *OPTIONS, "--guidance", "4")
    assert status == 2
    assert "got another (its value and this command's): guidance: 3.0 and 4.0; use another -o FOLDER" in errors


def test_parts_and_one_process_make_equal_tar_files(folder):
    settings = (*OPTIONS, "--format", "tar", "--save", "webp", "--no-metadata", "--seeds", "same", "--seed", "5")
    parts = [start(folder, "run", "photos", "-o", f"part-{i}", *settings, "--part", f"{i}/2") for i in range(2)]
    assert [end(part)[:2] for part in parts] == [(0, "2/3 shards, 4 images\n"), (0, "1/3 shards, 2 images\n")]
    shutil.copytree(folder / "part-1", folder / "part-0", dirs_exist_ok=True)
    assert imvar_batch(folder, "join", "part-0")[1].startswith("3/3 shards, 6 images: ")

    whole = folder / "whole"
    settings = {"format": "tar", "save": "webp", "metadata": False, "seeds": "same", "seed": 5}
    work(
        batch.plan(folder / "photos", whole, checkpoint="imvar-emoji", steps=2, n=2, shard=1, **settings).folder.parent
    )
    for name in ("manifest.jsonl", *(path.relative_to(whole) for path in whole.glob("shards/*/*"))):
        assert (folder / "part-0" / name).read_bytes() == (whole / name).read_bytes()
    made = rows(whole / "manifest.jsonl")
    assert [row["seed"] for row in made] == [5, 6] * 3
    with tarfile.open(whole / made[0]["file"]) as archive:
        image, row = (archive.extractfile(name).read() for name in archive.getnames()[:2])
    assert image[8:12] == b"WEBP"
    assert json.loads(row).items() < made[0].items()


@pytest.mark.parametrize(
    ("action", "number", "message"),
    [
        ("run", signal.SIGTERM, "imvar: terminated; the workers finish their present calls\n"),
        ("run", signal.SIGINT, "imvar: interrupted; the workers finish their present calls\n"),
        ("join", signal.SIGTERM, ""),
    ],
    ids=["run, SIGTERM", "run, SIGINT", "join, SIGTERM"],
)
def test_a_signal_ends_it_after_the_present_call(folder, action, number, message):
    out, command = folder / "out", ("run", "photos", "-o", "out", *FAST, "-n", "16", "--shard", "1")
    if action == "join":
        assert imvar_batch(folder, *command, "--plan-only")[:2] == (0, "0/3 shards, 0 images\n")
    process = start(folder, *(command if action == "run" else ("join", "out")))
    while not images(out) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    assert end(process) == (128 + number, "", message)
    assert {path.name for path in out.iterdir()} <= {"plan", "images", "rows", "done", "journal"}
    assert len(list(out.glob("done/*/*"))) < 3
    if action == "join":
        assert imvar_batch(folder, *command)[:2] == (0, f"3/3 shards, 48 images: {out / 'manifest.jsonl'}\n")


def test_watching_a_batch(folder):
    assert imvar_batch(folder, "run", "photos", "-o", "out", *OPTIONS, "--plan-only", "-q") == (0, "", "")
    watching = start(folder, "status", "out", "--watch")
    assert watching.stdout.readline() == "0/3 shards, 0 images, 0 workers\n"
    assert imvar_batch(folder, "join", "out")[0] == 0
    status, printed, errors = end(watching)
    assert (status, errors) == (0, "")
    assert printed.splitlines()[-1].startswith("3/3 shards, 6 images, ")


def test_the_progress_on_a_terminal_is_one_line_that_fits(folder):
    status, lines = run_in_terminal("batch", "run", "photos", "-o", "out", *OPTIONS, columns=25, cwd=folder)
    shown = [line.replace("\x1b[K", "") for line in lines if line]
    assert status == 0
    assert {"0/3 shards, 0 images", "3/3 shards, 6 images, 0 "} <= set(shown)
    assert shown[-1] == f"3/3 shards, 6 images: {folder / 'out' / 'manifest.jsonl'}"


def test_files_of_shared_conditions_are_checked_first(folder, capsys):
    arguments = (folder / "photos", "-o", folder / "out", "--negative", "nowhere.png")
    status, _, errors = here(capsys, "run", *arguments)
    assert (status, errors) == (2, "imvar: --negative: expected an image file, got 'nowhere.png'\n")
    assert not (folder / "out").exists()


@pytest.mark.parametrize(("rank", "gpu"), [("0", "3"), ("1", "GPU-5"), ("2", "3"), ("", "3,GPU-5")])
def test_each_rank_of_torchrun_has_a_gpu(rank, gpu, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    use_gpu_of_rank()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu
