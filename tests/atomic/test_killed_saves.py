"""Saves are atomic if they are killed or the disk is full."""

import errno
import itertools
import os
import resource
import shutil
import sys

import pytest

from imvar import CheckpointError
from imvar.conversion import convert
from tests.support.crashes import (
    changes_files,
    killed_at_each_step,
    leftovers,
    mount,
    nano_encoder,
    nano_pipeline,
    read_files,
    run_in_child,
    save_and_read,
)

# Killed


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("kind", ["part", "pipeline"])
def test_killed_anywhere(tmp_path, kind):
    make = nano_encoder if kind == "part" else nano_pipeline
    place, new = tmp_path / "place" / "model", make(1)
    save_and_read(make(0), tmp_path / "old", max_shard_size="1KB" if kind == "part" else "15KB")
    (tmp_path / "old" / "README.md").write_text("mine")
    before = read_files(tmp_path / "old")
    shutil.copytree(tmp_path / "old", place)
    after = save_and_read(new, place)
    assert after["README.md"] == b"mine"
    assert before.keys() - after.keys()
    steps, outcomes = 0, set()
    for killed in killed_at_each_step(lambda: new.save_pretrained(place), every=1 if kind == "part" else 10):
        found = read_files(place)
        assert found in (before, after)
        steps += 1
        outcomes.add(found == after)
        if killed:
            assert save_and_read(new, place) == after
            assert not leftovers(place.parent)
            shutil.rmtree(place)
            shutil.copytree(tmp_path / "old", place)
    assert steps > 30
    assert outcomes == {True, False}


@pytest.mark.usefixtures("no_fsync")
def test_killed_anywhere_before_there_is_a_folder(tmp_path):
    place, new = tmp_path / "place" / "model", nano_encoder(1)
    after = save_and_read(new, place)
    shutil.rmtree(place.parent)
    for _ in killed_at_each_step(lambda: new.save_pretrained(place)):
        assert not place.exists() or read_files(place) == after
        shutil.rmtree(place.parent, ignore_errors=True)


@pytest.mark.usefixtures("no_fsync")
def test_killed_anywhere_among_other_files(tmp_path):
    """Nothing is replaced, so the folder itself stays, and has no checkpoint until all files are in place."""
    place, new = tmp_path / "home", nano_encoder(1)
    place.mkdir()
    (place / "diary").write_text("mine")
    inode = place.stat().st_ino
    after = save_and_read(new, tmp_path / "other") | {"diary": b"mine"}
    complete = set()
    for _ in killed_at_each_step(lambda: new.save_pretrained(place)):
        complete.add("config.json" in (found := read_files(place)))
        assert found == (after if "config.json" in found else {k: after[k] for k in found.keys() | {"diary"}})
        for name in ("config.json", "model.safetensors"):
            (place / name).unlink(missing_ok=True)
    assert complete == {True, False}
    assert place.stat().st_ino == inode
    assert save_and_read(new, place) == after
    assert not leftovers(tmp_path)


@pytest.mark.usefixtures("no_fsync")
def test_a_single_file_killed_anywhere(tmp_path):
    """The file is the old or the new one, and the next write removes leftovers."""
    place = tmp_path / "place"
    for seed in (0, 1):
        nano_pipeline(seed).save_pretrained(tmp_path / str(seed))

    def write(seed):
        convert(tmp_path / str(seed), place / "model.safetensors", to="original")
        return read_files(place)

    after, before, outcomes = write(1), write(0), set()
    for killed in killed_at_each_step(lambda: write(1), every=4):
        found = {"model.safetensors": (place / "model.safetensors").read_bytes()}
        assert found in (before, after)
        outcomes.add(found == after)
        if killed:
            assert write(0) == before
            assert [path.name for path in place.iterdir()] == ["model.safetensors"]
    assert outcomes == {True, False}


# Errors


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.filterwarnings("ignore:.*(cannot be removed|not flushed|may be lost)")
@pytest.mark.parametrize("kind", ["part", "file"])
def test_an_error_anywhere(tmp_path, kind):
    """The message has the resulting state."""
    place, parts = tmp_path / "place", [nano_encoder(0), nano_encoder(1)]
    for seed in (0, 1):
        nano_pipeline(seed).save_pretrained(tmp_path / str(seed))

    def write(seed):
        if kind == "part":
            return save_and_read(parts[seed], place)
        convert(tmp_path / str(seed), place / "model.safetensors", to="original")
        return read_files(place)

    def fail_at(step):
        operations, message = itertools.count(), ""

        def hook(event, args):
            if changes_files(event, args) and next(operations) == step:
                raise OSError(errno.EIO, "Input/output error")

        sys.addaudithook(hook)
        try:
            write(1)
        except CheckpointError as error:
            message = str(error)
        found = {name: content for name, content in read_files(place).items() if ".tmp" not in name}
        assert found == (before if message else after)
        assert not message or "Input/output error; nothing was changed" in message
        if next(operations) <= step:
            os._exit(2)

    after, before = write(1), write(0)
    shutil.copytree(place, tmp_path / "before")
    for step in itertools.count():
        if code := run_in_child(lambda step=step: fail_at(step)):
            break
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "before", place)
    assert (code, step > 10) == (2, True)


# Clean-up that fails, when all is written


def save_over(kind, tmp_path):
    """Write a checkpoint over another one as a folder or a file; return whether the new one is there."""
    for seed in (0, 1):
        nano_pipeline(seed).save_pretrained(tmp_path / str(seed))
    target, to = (tmp_path / "new.safetensors", "original") if kind == "file" else (tmp_path / "new", "diffusers")
    convert(tmp_path / "1", target, to=to)
    after = read_files(target.parent)
    convert(tmp_path / "0", target, to=to)
    before = read_files(target.parent)

    def save():
        nano_pipeline(1).save_pretrained(target) if kind == "save" else convert(tmp_path / "1", target, to=to)
        found = {name: text for name, text in read_files(tmp_path).items() if ".tmp" not in name}
        assert before != after == found

    return save


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("kind", ["save", "folder", "file"])
def test_a_lock_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, kind):
    save, unlink = save_over(kind, tmp_path), os.unlink

    def fail(path, **options):
        if str(path).endswith("tmp-lock"):
            raise OSError(errno.EIO, "Input/output error")
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", fail)
    with pytest.warns(UserWarning, match=r"tmp-lock: the lock file cannot be removed: Input/output error") as caught:
        save()
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("kind", ["save", "folder"])
def test_an_old_folder_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, kind):
    save = save_over(kind, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **options: None)
        with pytest.warns(UserWarning, match=r"tmp-[0-9a-f]{16}: the temporary folder cannot be removed"):
            save()
    save()
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("kind", ["save", "folder", "file"])
def test_a_folder_that_cannot_be_flushed_is_a_warning(tmp_path, monkeypatch, kind):
    save = save_over(kind, tmp_path)

    def fail(handle):
        if os.path.samestat(os.fstat(handle), tmp_path.stat()):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.warns(UserWarning, match=r"new[.\w]*: written, but not flushed to the disk: Input/output error"):
        save()


def test_an_error_after_files_are_moved_one_by_one(tmp_path, monkeypatch):
    """All of them are new then."""
    save, moved = save_over("save", tmp_path), []
    monkeypatch.setattr("imvar.atomic.folder.exchange", lambda a, b: moved.append(a))

    def fail(handle):
        if moved:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.warns(UserWarning, match=r"new: written, but not flushed to the disk"):
        save()


# Out of disk


@pytest.mark.parametrize("safe", [True, False])
def test_a_disk_that_is_full(tmp_path, monkeypatch, safe):
    before = save_and_read(nano_pipeline(0), tmp_path / "model", safe_serialization=safe)

    def full(handle):
        if next(calls) >= allowed:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for good in range(0, 20, 3):
        calls, allowed = itertools.count(), good
        with pytest.raises(CheckpointError, match=r"got a full disk; nothing was changed") as caught:
            nano_pipeline(1).save_pretrained(tmp_path / "model", safe_serialization=safe)
        assert caught.value.path.is_relative_to(tmp_path / "model")
        assert read_files(tmp_path / "model") == before
        assert not leftovers(tmp_path)


@pytest.mark.parametrize("safe", [True, False])
def test_a_file_that_cannot_grow(tmp_path, safe):
    """The kernel limits the file size, in the middle of a tensor."""
    before = save_and_read(nano_pipeline(0), tmp_path / "model", safe_serialization=safe)

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
        with pytest.raises(CheckpointError, match=r"got a file above the size limit .*; nothing was changed") as caught:
            nano_pipeline(1).save_pretrained(tmp_path / "model", safe_serialization=safe)
        assert caught.value.path.parent.parent == tmp_path / "model"

    assert run_in_child(run) == 0
    assert read_files(tmp_path / "model") == before
    assert not leftovers(tmp_path)


def test_a_small_disk(tmp_path):
    """A file system with room for one checkpoint and a half."""

    def run():
        size = sum(map(len, save_and_read(nano_pipeline(0), tmp_path / "measure").values()))
        if not mount(b"tmpfs", "none", tmp_path, f"size={2 * size}".encode()):
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
        before = save_and_read(nano_pipeline(0), tmp_path / "model")
        with pytest.raises(CheckpointError, match=r"got a full disk|got a file above the size limit"):
            nano_pipeline(1).save_pretrained(tmp_path / "model")
        assert read_files(tmp_path / "model") == before
        assert not leftovers(tmp_path)

    assert run_in_child(run) == 0
