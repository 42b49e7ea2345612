"""Concurrent saves of one folder, and loads during saves."""

import itertools
import os
import shutil
import threading
import time

import pytest

import imvar
from imvar import CheckpointError, StableDiffusionImageVariationPipeline
from imvar.atomic.filesystem import locked
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
