"""Locations of saves: links, mount points, read-only folders, the working directory."""

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest

import imvar
from imvar import CheckpointError
from imvar.atomic import folder as folders
from imvar.atomic.folder import atomic_folder
from imvar.conversion import convert
from tests.support.crashes import (
    ROOT,
    equal,
    leftovers,
    mount,
    nano_encoder,
    nano_pipeline,
    read_files,
    run_in_child,
    save_and_read,
)


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place, words in (
        (tmp_path / "file", "a file"),
        (tmp_path / "file" / "below", "got a file in place of a folder"),
        (tmp_path / "file" / "far" / "below", "got a file in place of a folder"),
    ):
        for part in (nano_encoder(0), nano_pipeline(0), imvar.PNDMScheduler()):
            with pytest.raises(CheckpointError, match=words) as caught:
                part.save_pretrained(place)
            assert caught.value.path.is_relative_to(tmp_path / "file")
    assert read_files(tmp_path) == {"file": b"mine"}


def test_permissions(tmp_path):
    """If only the folder itself is writable, files are moved in; if it is not, the save is refused."""
    place, closed = tmp_path / "above" / "model", tmp_path / "open" / "closed"
    for folder in (place, closed):
        save_and_read(nano_encoder(0), folder, max_shard_size="1KB")
    after, before = save_and_read(nano_encoder(1), tmp_path / "new"), read_files(closed)
    for path in (*tmp_path.parents, tmp_path):
        if ROOT and path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755)
    for path in tmp_path.rglob("*"):
        if ROOT:
            os.chown(path, 65534, 65534)
    closed.chmod(0o555)
    place.parent.chmod(0o555)

    def run():
        if ROOT:
            os.setgid(65534)
            os.setuid(65534)
        inode = place.stat().st_ino
        nano_encoder(1).save_pretrained(place)
        assert place.stat().st_ino == inode
        for folder in (closed, place.parent / "other"):
            with pytest.raises(CheckpointError, match=r"got no permission to write; nothing was changed"):
                nano_encoder(1).save_pretrained(folder)

    try:
        assert run_in_child(run) == 0
        assert read_files(place) == after
        assert read_files(closed) == before
        assert not leftovers(tmp_path)
    finally:
        place.parent.chmod(0o755)
        closed.chmod(0o755)


def test_links_to_folders_are_followed(tmp_path):
    before = save_and_read(nano_encoder(0), tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "fresh").symlink_to("created")
    for link in ("link", "fresh"):
        nano_encoder(1).save_pretrained(tmp_path / link)
        assert (tmp_path / link).is_symlink()
        assert equal(nano_encoder(1).from_pretrained(tmp_path / link), nano_encoder(1))
    assert read_files(tmp_path / "real") != before


def test_links_to_files_are_replaced_not_followed(tmp_path):
    """The hub's cache consists of such links, whose targets may belong to other checkpoints."""
    before = save_and_read(nano_encoder(0), tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in before:
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{name}")
    nano_encoder(1).save_pretrained(tmp_path / "snapshot")
    assert read_files(tmp_path / "blobs") == before
    assert equal(nano_encoder(1).from_pretrained(tmp_path / "snapshot"), nano_encoder(1))


def in_place(folder, save):
    """Assert that a save is complete and leaves nothing else; return whether the folder kept its inode."""
    save_and_read(nano_pipeline(0), folder, max_shard_size="1KB")
    (folder / "README.md").write_text("mine")
    inode = folder.stat().st_ino
    save(nano_pipeline(1))
    assert read_files(folder) == save_and_read(nano_pipeline(1), folder.parent / "other") | {"README.md": b"mine"}
    assert not leftovers(folder.parent)
    return folder.stat().st_ino == inode


@pytest.mark.usefixtures("no_fsync")
def test_where_the_folder_stays(tmp_path, monkeypatch):
    assert not in_place(tmp_path / "a", lambda pipe: pipe.save_pretrained(tmp_path / "a"))
    (tmp_path / "b" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "b" / "below")
    assert in_place(tmp_path / "b", lambda pipe: pipe.save_pretrained(".."))
    with monkeypatch.context() as patch:
        patch.setattr(folders, "MAX_LINKED_FILES", 3)
        assert in_place(tmp_path / "d", lambda pipe: pipe.save_pretrained(tmp_path / "d"))
    with monkeypatch.context() as patch:

        def refuse(*paths, **options):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        patch.setattr(os, "link", refuse)
        assert in_place(tmp_path / "e", lambda pipe: pipe.save_pretrained(tmp_path / "e"))
    with monkeypatch.context() as patch:
        patch.setattr(folders, "exchange", lambda a, b: False)
        assert in_place(tmp_path / "f", lambda pipe: pipe.save_pretrained(tmp_path / "f"))


def test_a_working_directory_that_was_removed(tmp_path):
    nano_pipeline(0).save_pretrained(tmp_path / "source")
    convert_to = {"model": "diffusers", "model.safetensors": "original"}

    def run():
        (tmp_path / "gone").mkdir()
        os.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        for part in (nano_encoder(0), nano_pipeline(0), imvar.PNDMScheduler()):
            with pytest.raises(CheckpointError) as caught:
                part.save_pretrained("model")
            assert caught.value.path in (Path("model"), Path("model/scheduler_config.json"))
        for target, to in convert_to.items():
            with pytest.raises(
                CheckpointError, match=f"{target}: .*the working directory was removed; pass an absolute"
            ):
                convert(tmp_path / "source", target, to=to)
        nano_encoder(0).save_pretrained(tmp_path / "model")

    assert run_in_child(run) == 0
    assert (tmp_path / "model" / "config.json").exists()


OBSTACLES = {
    "a folder in place of a file": lambda vae: [(vae / "config.json").unlink(), (vae / "config.json").mkdir()],
    "a file in place of a folder": lambda vae: [shutil.rmtree(vae), vae.write_text("mine")],
    "no permission to write": lambda vae: None,
}


@pytest.mark.parametrize("words", OBSTACLES)
def test_obstacles_are_detected_before_files_are_moved(tmp_path, monkeypatch, words):
    """Obstacles to the last file, created meanwhile, are detected before the first is moved."""

    def save(folder):
        with atomic_folder(folder) as new:
            nano_pipeline(1).save_pretrained(new)
            OBSTACLES[words](folder / "vae")
            before.append(read_files(folder))

    before = []
    save_and_read(nano_pipeline(0), tmp_path / "a")
    monkeypatch.setattr(folders, "MAX_LINKED_FILES", 1)  # so that the folder is not exchanged
    if words.startswith("no"):
        monkeypatch.setattr(folders, "is_writable", lambda path: path.name != "vae")
    with pytest.raises(CheckpointError, match=f"got {words}; nothing was changed"):
        save(tmp_path / "a")
    assert read_files(tmp_path / "a") == before[0]


@pytest.mark.parametrize("kind", [b"tmpfs", None], ids=["another", "bind"])
@pytest.mark.parametrize("where", ["model", "model/unet", "model/data set/x"])
def test_mount_points(tmp_path, kind, where):
    (tmp_path / where).mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    mine = {str(Path(where, "mine").relative_to("model")): b"mine"}

    def run():
        mounted = mount(kind, tmp_path / "elsewhere", place := tmp_path / where)
        if not mounted:
            os.path.ismount = lambda folder: folder == place
        (tmp_path / where / "mine").write_text("mine")
        created = []
        sys.addaudithook(lambda event, args: created.append(Path(args[0])) if event == "os.mkdir" else None)
        nano_pipeline(0).save_pretrained(tmp_path / "model", max_shard_size="1KB")
        inode = (tmp_path / where).stat().st_ino
        after = save_and_read(nano_pipeline(1), tmp_path / "model")
        assert (tmp_path / where).stat().st_ino == inode or not mounted
        if kind:  # whether it was written next to the folder, rather than inside, on the same file system
            next_to = any(path.parent == tmp_path and ".tmp-" in path.name for path in created)
            assert next_to == (where != "model")
        assert after == save_and_read(nano_pipeline(1), tmp_path / "other") | mine
        assert not leftovers(tmp_path)

    assert run_in_child(run) == 0
