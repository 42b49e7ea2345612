"""Files that a save replaces and keeps, their order, and when they are on the disk."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from imvar.atomic import folder as folders
from imvar.atomic.file import write_text
from imvar.atomic.folder import atomic_folder
from imvar.conversion import convert
from imvar.weights.writing import write_tensors
from tests.support.crashes import (
    ROOT,
    equal,
    leftovers,
    nano_encoder,
    nano_pipeline,
    read_files,
    run_in_child,
    save_and_read,
)


def test_other_files_stay(tmp_path):
    place = tmp_path / "model"
    nano_pipeline(0).save_pretrained(place)
    nano_pipeline(2).save_pretrained(place, variant="fp16")
    mine = {"README.md": "mine", ".git/objects/ab/cd": "object", "unet/notes": "mine", "logs/log": "one "}
    for name, text in mine.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    (place / "link").symlink_to("unet/notes")
    (place / "astray").symlink_to("../nowhere")
    (place / "README.md").chmod(0o640)
    place.chmod(0o750)
    (place / "logs").chmod(0o700)
    before = read_files(place)
    with (place / "logs" / "log").open("a") as log:
        nano_pipeline(1).save_pretrained(place)
        log.write("two")
    after = read_files(place)
    assert after.pop("logs/log") == b"one two"
    kept = {name for name in after if before[name] == after[name]}
    assert kept >= {
        "README.md",
        ".git/objects/ab/cd",
        "unet/notes",
        "link",
        "astray",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }
    assert {"scheduler/scheduler_config.json", "vae/diffusion_pytorch_model.safetensors"} <= after.keys() - kept
    assert [(place / name).stat().st_mode & 0o777 for name in ("", "logs", "README.md")] == [0o750, 0o700, 0o640]
    assert {path.stat().st_nlink for path in place.rglob("*") if path.is_file()} == {1}
    assert not leftovers(tmp_path)


def test_the_folder_that_the_weights_are_mapped_from(tmp_path):
    before = nano_encoder(0)
    before.save_pretrained(tmp_path)
    model = before.from_pretrained(tmp_path)
    other = before.from_pretrained(tmp_path)
    with torch.no_grad():
        model.visual_projection.weight += 1
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert equal(other, before)
    assert equal(before.from_pretrained(tmp_path), model)


def test_permission_bits_follow_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        nano_pipeline(0).save_pretrained(tmp_path / "model")
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {0o640}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_dir()} == {0o750}


@pytest.mark.parametrize("exchanged", [True, False])
@pytest.mark.parametrize("to", [None, "diffusers", "original"])
def test_replaced_files_keep_their_permissions(tmp_path, monkeypatch, to, exchanged):
    monkeypatch.setattr(folders, "MAX_LINKED_FILES", folders.MAX_LINKED_FILES * exchanged)
    source, place = tmp_path / "source", tmp_path / ("place/x.safetensors" if to == "original" else "place")
    nano_pipeline(1).save_pretrained(source)

    def save():
        nano_pipeline(1).save_pretrained(place) if to is None else convert(source, place, to=to)
        return {path: path.stat() for path in (tmp_path / "place").rglob("*") if path.is_file()}

    group = 12345 if ROOT else (set(os.getgroups()) - {os.getgid()} or {os.getgid()}).pop()
    for path in save():
        path.chmod(0o600)
        os.chown(path, 12345 if ROOT else -1, group)
    removed = next(path for path in save() if path.suffix == ".safetensors")
    inode = removed.stat().st_ino
    if to != "original":
        removed.unlink()
    mask = os.umask(0o022)
    try:
        after = save()
    finally:
        os.umask(mask)
    if to != "original":
        assert after.pop(removed).st_mode & 0o777 == 0o644  # a new file
    else:
        assert after[removed].st_ino != inode
    assert {status.st_mode & 0o777 for status in after.values()} == {0o600}
    assert {(status.st_uid, status.st_gid) for status in after.values()} == {(12345 if ROOT else os.getuid(), group)}


def test_a_private_file_is_never_readable_by_others(tmp_path):
    """Not even while it is written."""
    path, modes, mask = tmp_path / "w.safetensors", [], os.umask(0o022)
    try:
        write_tensors(path, {"w": torch.ones(3)})
        path.chmod(0o600)
        write_tensors(
            path,
            {"w": torch.zeros(3)},
            on_bytes=lambda count: modes.extend(file.stat().st_mode & 0o777 for file in tmp_path.iterdir()),
        )
    finally:
        os.umask(mask)
    assert set(modes) == {0o600}


def test_extended_attributes_are_kept_and_times_are_not(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    os.utime(path, ns=(0, 0))
    try:
        os.setxattr(path, "user.note", b"mine")
    except (OSError, AttributeError):
        pytest.skip("a file system or a system without extended attributes")
    write_text(path, "new")
    assert (path.read_text(), os.getxattr(path, "user.note")) == ("new", b"mine")
    assert path.stat().st_mtime > 0


def test_a_block_that_fails_changes_nothing(tmp_path):
    def fail():
        with atomic_folder(tmp_path / "new" / "folder") as new:
            (new / "file").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list((tmp_path / "new").iterdir())


# Concurrent changes


class InPlaceComponent:
    """A third-party component that writes to its files in place."""

    def __init__(self, meanwhile=lambda: None):
        self.config, self.meanwhile = {}, meanwhile

    def save_pretrained(self, folder, **options):
        Path(folder).mkdir(exist_ok=True)
        with open(Path(folder) / "preprocessor_config.json", "r+") as file:
            assert file.read()
            file.seek(0)
            file.write("{}        ")
        self.meanwhile()


def test_components_that_write_in_place(tmp_path):
    place = tmp_path / "model"
    before = save_and_read(nano_pipeline(0), place)

    def fail():
        raise RuntimeError("too bad")

    with pytest.raises(RuntimeError, match="too bad"):
        nano_pipeline(1, feature_extractor=InPlaceComponent(fail)).save_pretrained(place)
    assert read_files(place) == before
    nano_pipeline(1, feature_extractor=InPlaceComponent()).save_pretrained(place)
    assert (place / "feature_extractor" / "preprocessor_config.json").read_text().startswith("{}")


def test_files_added_during_a_save_stay(tmp_path):
    place = tmp_path / "model"
    nano_pipeline(0).save_pretrained(place)
    (place / "progress").write_text("1 of 2")

    def add_files():
        (place / "logs" / "deep").mkdir(parents=True)
        (place / "logs" / "deep" / "log").write_text("new")
        (place / "unet" / "notes").write_text("new")
        write_text(place / "progress", "2 of 2")
        write_text(place / "model_index.json", "of a save that did not wait")

    after = save_and_read(nano_pipeline(1, feature_extractor=InPlaceComponent(add_files)), place)
    assert (after["logs/deep/log"], after["unet/notes"], after["progress"]) == (b"new", b"new", b"2 of 2")
    assert json.loads(after["model_index.json"])
    assert not leftovers(tmp_path)


# Order


def test_indexes_are_moved_last(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "diary").write_text("mine")

    def run():
        moved = []
        sys.addaudithook(lambda event, args: moved.append(args) if event == "os.rename" else None)
        nano_pipeline(0).save_pretrained(tmp_path / "model", max_shard_size="15KB")
        places = [
            Path(target).relative_to(tmp_path / "model")
            for _, target, *_ in moved
            if "tmp" not in str(target).removeprefix(str(tmp_path))
        ]
        assert places[-1] == Path("model_index.json")
        assert [path.suffix == ".json" for path in places] == sorted(path.suffix == ".json" for path in places)
        assert len(places) > 10

    assert run_in_child(run) == 0


def test_files_are_flushed_before_they_are_renamed(tmp_path):
    """After a power failure, a file that was renamed but not flushed may be empty."""
    nano_encoder(0).save_pretrained(tmp_path / "model")

    def run():
        fsync, synced, unsynced = os.fsync, set(), []
        os.fsync = lambda handle: (fsync(handle), synced.add(os.fstat(handle).st_ino))

        def hook(event, args):
            if event == "os.rename" and os.stat(args[0]).st_ino not in synced:
                unsynced.append(args)
            if event == "ctypes.dlopen":  # on the way to the exchange
                (new,) = tmp_path.glob(".model.tmp-*[0-9a-f]")
                unsynced.extend(path for path in [new, *new.rglob("*")] if path.stat().st_ino not in synced)

        sys.addaudithook(hook)
        nano_encoder(1).save_pretrained(tmp_path / "model")
        assert len(synced) == 4  # two files, the new folder, the one above
        assert not unsynced

    assert run_in_child(run) == 0
