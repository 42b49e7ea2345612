"""Concurrent saves of one folder, and loads during saves."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import imvar
from imvar import CheckpointError, StableDiffusionImageVariationPipeline
from imvar.atomic import filesystem
from imvar.atomic.filesystem import locked
from imvar.atomic.folder import atomic_folder
from imvar.conversion import convert
from tests.support.crashes import equal, leftovers, nano_encoder, nano_pipeline, read_files, run_and_exit, save_and_read

# Loads


@pytest.mark.usefixtures("no_fsync")
def test_readers_see_one_save_or_raise(tmp_path):
    """While two checkpoints are saved alternately, each load returns one of them, or an error."""
    pipes = [nano_pipeline(0), nano_pipeline(1)]
    pipes[0].save_pretrained(tmp_path / "model")

    def write():
        for turn in itertools.count(1):
            if (tmp_path / "stop").exists():
                return
            pipes[turn % 2].save_pretrained(tmp_path / "model")
            time.sleep(0.15 * (turn % 3))  # sometimes during a load

    def read():
        out = []
        while len(out) < 10 or set(out) != {0, 1}:
            try:
                pipe = StableDiffusionImageVariationPipeline.from_pretrained(tmp_path / "model")
            except CheckpointError as error:
                if "files that stay the same while they are read" not in str(error):
                    raise
            else:
                out.append(pipe.scheduler.config.steps_offset)
                assert all(equal(getattr(pipe, part), getattr(pipes[out[-1]], part)) for part in pipe.modules)

    writer = os.fork()
    if not writer:
        run_and_exit(write)
    try:
        read()
    finally:
        (tmp_path / "stop").touch()
        assert os.waitpid(writer, 0)[1] == 0


@pytest.mark.usefixtures("no_fsync")
def test_a_folder_that_changes_while_it_is_read(tmp_path):
    nano_encoder(0).save_pretrained(tmp_path)
    saves = []

    class Unlucky(imvar.CLIPVisionModelWithProjection):
        @classmethod
        def read_config(cls, path, **changes):
            config = super().read_config(path, **changes)
            if saves:
                nano_encoder(saves.pop()).save_pretrained(tmp_path)
            return config

    saves = [1]
    assert equal(Unlucky.from_pretrained(tmp_path), nano_encoder(1))
    saves = [1, 2, 3] * 5
    with pytest.raises(CheckpointError, match="files that stay the same while they are read") as caught:
        Unlucky.from_pretrained(tmp_path)
    assert caught.value.path == tmp_path


@pytest.mark.usefixtures("no_fsync")
def test_loading_in_threads(tmp_path):
    pipe = nano_pipeline(0)
    pipe.save_pretrained(tmp_path)
    out = []
    threads = [threading.Thread(target=lambda: out.append(pipe.from_pretrained(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [equal(loaded.unet, pipe.unet) for loaded in out] == [True] * 4


# Saves


def test_a_lock_is_on_the_current_file(tmp_path):
    """A process that waited for a lock finds its file removed, while a third one would lock a new file."""

    def wait():
        with locked(tmp_path / "lock") as sole:
            out.append(sole and (tmp_path / "lock").exists())

    out, second = [], threading.Thread(target=wait)
    with locked(tmp_path / "lock"):
        second.start()
        time.sleep(0.2)
    second.join()
    assert out == [True]
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("exists", [True, False])
def test_saves_of_one_folder_wait_for_each_other(tmp_path, exists):
    """Otherwise shards of one would mix with the index of the other."""
    place = tmp_path / "model"
    options = [{"max_shard_size": "10KB"}, {}]
    after = [save_and_read(nano_pipeline(i), tmp_path / f"{i}", **options[i]) for i in range(2)]
    for _ in range(3):
        if exists:
            nano_pipeline(2).save_pretrained(place)
        children = []
        for i in range(2):
            child = os.fork()
            if not child:
                run_and_exit(lambda i=i: nano_pipeline(i).save_pretrained(place, **options[i]))
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        assert read_files(place) in after
        assert not leftovers(tmp_path)
        shutil.rmtree(place)


@pytest.mark.usefixtures("no_fsync")
def test_threads_saving_one_folder(tmp_path):
    after = [save_and_read(nano_encoder(i), tmp_path / f"{i}") for i in range(3)]
    threads = [threading.Thread(target=nano_encoder(i).save_pretrained, args=[tmp_path / "model"]) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_files(tmp_path / "model") in after
    assert not leftovers(tmp_path)


# Locks that are not released


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(filesystem, "LOCK_WARNING", 0.05)
    monkeypatch.setattr(filesystem, "LOCK_TIMEOUT", 0.3)


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print(flush=True)
time.sleep(60)
"""


@pytest.mark.usefixtures("no_fsync", "impatient")
@pytest.mark.parametrize("to", [None, "diffusers", "original"])
def test_a_lock_that_another_process_keeps(tmp_path, to):
    """A stopped save, or somebody else's lock."""
    source, place = tmp_path / "source", tmp_path / "place" / ("model.safetensors" if to == "original" else "model")
    nano_pipeline(1).save_pretrained(source)

    def save():
        nano_pipeline(1).save_pretrained(place) if to is None else convert(source, place, to=to)

    save()
    before, lock = read_files(place.parent), place.with_name(f".{place.name}.tmp-lock")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline()
        words = (
            r"tmp-lock: expected a lock that is released, got .* 0\.3 seconds; end the process .*, or remove this file"
        )
        with (
            pytest.warns(UserWarning, match=r"tmp-lock: waiting for") as warned,
            pytest.raises(CheckpointError, match=words) as caught,
        ):
            save()
        assert caught.value.path == lock
        assert [warning.filename for warning in warned] == [__file__]
        assert read_files(place.parent) == before | {lock.name: b""}
        lock.unlink()  # the remedy
        save()
    finally:
        holder.kill()
        holder.communicate()
    save()
    assert not leftovers(tmp_path)


@pytest.mark.usefixtures("no_fsync", "impatient")
@pytest.mark.filterwarnings("ignore:.*waiting for the process")
def test_a_slow_save_is_waited_for(tmp_path):
    def save_slowly():
        with atomic_folder(tmp_path / "model") as new:
            nano_encoder(0).save_pretrained(new)
            (tmp_path / "started").touch()
            for i in range(10):
                (new / "notes").write_text(str(i))
                time.sleep(0.1)

    child = os.fork()
    if not child:
        run_and_exit(save_slowly)
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    nano_encoder(1).save_pretrained(tmp_path / "model")
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "model" / "notes").read_text() == "9"
    assert equal(nano_encoder(1).from_pretrained(tmp_path / "model"), nano_encoder(1))


@pytest.mark.usefixtures("no_fsync", "impatient")
def test_a_stopped_save_is_not_waited_for(tmp_path):
    def stop():
        with atomic_folder(tmp_path / "model") as new:
            nano_encoder(0).save_pretrained(new)
            os.kill(os.getpid(), signal.SIGSTOP)

    child = os.fork()
    if not child:
        run_and_exit(stop)
    try:
        os.waitpid(child, os.WUNTRACED)
        with pytest.warns(UserWarning, match="waiting for"), pytest.raises(CheckpointError, match="no progress"):
            nano_encoder(1).save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    nano_encoder(1).save_pretrained(tmp_path / "model")
    assert not leftovers(tmp_path)


def test_a_link_in_place_of_a_lock_is_not_followed(tmp_path):
    (tmp_path / ".model.tmp-lock").symlink_to("victim")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="expected a lock file, got a symbolic link; remove it") as caught:
            nano_encoder(0).save_pretrained(tmp_path / "model")
        assert caught.value.path == tmp_path / ".model.tmp-lock"
        assert not (tmp_path / "model").exists()
        assert (tmp_path / ".model.tmp-lock").is_symlink()
        assert not (tmp_path / "victim").exists()
    (tmp_path / "victim").write_text("mine")
    with pytest.raises(CheckpointError, match="a symbolic link"):
        nano_encoder(0).save_pretrained(tmp_path / "model")
    assert (tmp_path / "victim").read_text() == "mine"
