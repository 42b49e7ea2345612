"""A worker of `imvar batch` may be killed before each of its file operations, and each of them may find a full disk."""

import errno
import itertools
import os
import shutil
import signal
import sys
from functools import cache

import pytest

if sys.platform == "win32":
    pytest.skip("needs fork", allow_module_level=True)

import imvar
from imvar import batch
from imvar.batch.environment import check_environment
from imvar.batch.store import FULL, FullDiskError
from imvar.batch.worker import work
from tests.support.crashes import changes_files, nano_pipeline, read_files, run_and_exit, run_in_child

LAYOUTS = ("files", "tar", "parquet")
CREATES = {"open", "os.link", "os.mkdir"}  # what a full disk refuses


@pytest.fixture(scope="module")
def planned(tmp_path_factory, photo):
    """The plan of a photo and a broken one in a shard, by layout, and the output folder of a quiet run."""
    folder = tmp_path_factory.mktemp("steps")
    (folder / "photos").mkdir()
    photo.resize((16, 16)).save(folder / "photos" / "photo.png")
    (folder / "photos" / "broken.png").write_text("no image")
    nano_pipeline(0, scheduler=imvar.DDIMScheduler()).save_pretrained(folder / "model")
    loaded(str(folder / "model"))
    for layout in LAYOUTS:
        options = {"n": 1, "steps": 1, "batch": 1, "shard": 2, "format": layout, "device": "cpu", "dtype": "float32"}
        batch.plan(folder / "photos", folder / layout, checkpoint=folder / "model", **options)
        shutil.copytree(folder / layout, folder / f"{layout}-quiet")
        assert run_in_child(lambda out=folder / f"{layout}-quiet": work_on(out)) == 0
    return folder


def work_on(out):
    """Work with a pipeline that was loaded once, and is checked as one that has just been loaded."""
    assert work(out, load=load)


def load(plan):
    check_environment(plan, pipe := loaded(plan.settings.checkpoint))
    return pipe


@cache
def loaded(folder):
    pipe = imvar.StableDiffusionImageVariationPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def everything(folder):
    """Return the bytes of all files in a folder, and the folders."""
    return read_files(folder), sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_dir())


def child_with(hook, run):
    """Call `run` in a child process whose file operations call `hook(event, number)`; return its exit code."""
    child = os.fork()
    if not child:
        operations = itertools.count()

        def audit(event, args):
            if changes_files(event, args):
                hook(event, next(operations))

        sys.addaudithook(audit)
        run_and_exit(run)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_before_each_file_operation(planned, layout, tmp_path, no_fsync):
    expected, killed = everything(planned / f"{layout}-quiet"), []
    for step in itertools.count():
        out = tmp_path / str(step)
        shutil.copytree(planned / layout, out)

        def kill_at(event, number, step=step):
            if number == step:
                os.kill(os.getpid(), signal.SIGKILL)

        killed.append(child_with(kill_at, lambda out=out: work_on(out)))
        assert run_in_child(lambda out=out: work_on(out)) == 0
        assert everything(out) == expected, f"killed before operation {step}"
        if killed[-1] == 0:
            break
    assert len(killed) > 25
    assert set(killed[:-1]) == {-signal.SIGKILL}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_disk_at_each_file_operation(planned, layout, tmp_path, no_fsync):
    """Workers end with the error that becomes exit status 74, leave nothing, and the next one goes on."""
    expected, errors = everything(planned / f"{layout}-quiet"), []
    for step in itertools.count():
        out = tmp_path / str(step)
        shutil.copytree(planned / layout, out)

        def refuse_from(event, number, step=step):
            if number >= step and event in CREATES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def fails_by_full_disk(out=out):
            try:
                work_on(out)
            except OSError as error:
                os._exit(74 if isinstance(error, FullDiskError) or error.errno in FULL else 1)

        errors.append(child_with(refuse_from, fails_by_full_disk))
        assert errors[-1] in (0, 74), f"at operation {step}"
        assert not list(out.glob("claims/*"))
        assert not list(out.glob("workers/*"))
        assert run_in_child(lambda out=out: work_on(out)) == 0
        assert everything(out) == expected, f"full at operation {step}"
        if errors[-1] == 0:
            break
    assert len(errors) > 25
