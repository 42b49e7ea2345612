"""Saving is whole or not at all: killed, out of disk, beside other saves, into folders that hold other things."""

import ctypes
import errno
import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from random_checkpoint import TINY_UNET, TINY_VAE, randomize
from safetensors.torch import load_file, save_file

import imvar
from imvar import CheckpointError, InputError, StableDiffusionImageVariationPipeline
from imvar.weights import folders, swapping
from imvar.weights.files import write_text
from imvar.weights.folders import replaced
from imvar.weights.stems import DIFFUSERS
from imvar.weights.writing import write_tensors, write_weights

NANO_ENCODER = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 16, "patch_size": 8, "projection_dim": 8}
NANO_UNET = TINY_UNET | {"block_out_channels": (4, 8), "norm_num_groups": 4, "cross_attention_dim": 8,
                         "attention_head_dim": 2}
NANO_VAE = TINY_VAE | {"block_out_channels": (4, 8), "norm_num_groups": 4, "layers_per_block": 1,
                       "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
ROOT = os.geteuid() == 0


def nano_encoder(seed):
    """Two of them differ in settings, too: one file of each would not load, or load as neither."""
    return randomize(imvar.CLIPVisionModelWithProjection(**NANO_ENCODER | {"intermediate_size": 8 + seed}), seed)


def nano_pipeline(seed, **parts):
    own = {"vae": randomize(imvar.AutoencoderKL(**NANO_VAE), seed), "image_encoder": nano_encoder(seed),
           "unet": randomize(imvar.UNet2DConditionModel(**NANO_UNET), seed), "safety_checker": None,
           "scheduler": imvar.PNDMScheduler(steps_offset=seed), "feature_extractor": imvar.CLIPImageProcessor()}
    return StableDiffusionImageVariationPipeline(**own | parts, requires_safety_checker=False)


def held(folder):
    """What lies in a folder: the bytes of each file, where each link leads."""
    return {str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()}


def saved(part, folder, **options):
    part.save_pretrained(folder, **options)
    return held(folder)


def temporaries(folder):
    return [path for path in folder.rglob(".*") if ".tmp" in path.name]


def forked(run):
    """Run in a child process. Its exit code: 0, the number of the signal that ended it below 0, or 1 for an error."""
    child = os.fork()
    if not child:
        code = 1
        try:
            run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def changes_files(event, args):
    if event == "open":
        return isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    return event.partition(".")[0] in ("os", "shutil", "ctypes", "fcntl") and event not in ("os.listdir", "os.scandir")


def killed_at_each_step(save):
    """Have `save` killed in child processes, before its first file operation, its second, and on to its end."""
    for step in itertools.count():
        def run(step=step):
            operations = itertools.count()

            def hook(event, args):
                if changes_files(event, args) and next(operations) == step:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            save()

        code = forked(run)
        assert code in (0, -signal.SIGKILL)
        yield step
        if code == 0:
            return


@pytest.fixture
def no_fsync(monkeypatch):
    """A killed process loses nothing that it has written, synchronised or not; waiting for the disk takes long."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def in_two_steps(monkeypatch):
    """A system that cannot exchange two folders."""
    monkeypatch.setattr(swapping, "rename_exchange", lambda a, b: False)


# Killed


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("kind", ["part", "pipeline"])
def test_killed_anywhere(tmp_path, kind):
    make = nano_encoder if kind == "part" else nano_pipeline
    place, new = tmp_path / "place" / "model", make(1)
    saved(make(0), tmp_path / "old", max_shard_size="1KB" if kind == "part" else "15KB")
    (tmp_path / "old" / "README.md").write_text("mine")
    before = held(tmp_path / "old")
    shutil.copytree(tmp_path / "old", place)
    after = saved(new, place)
    assert after["README.md"] == b"mine"
    assert before.keys() - after.keys()
    seen = set()
    for step in killed_at_each_step(lambda: new.save_pretrained(place)):
        found = held(place)
        assert found in (before, after)
        seen.add(found == after)
        if step % 10 == 0:
            assert saved(new, place) == after
            assert not temporaries(place.parent)
        for path in place.parent.iterdir():
            if path != place or found == after or step % 10 == 0:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not place.exists():
            shutil.copytree(tmp_path / "old", place)
    assert step > 30
    assert seen == {True, False}


@pytest.mark.usefixtures("no_fsync")
def test_killed_anywhere_before_there_is_a_folder(tmp_path):
    place, new = tmp_path / "place" / "model", nano_encoder(1)
    after = saved(new, place)
    shutil.rmtree(place.parent)
    for _ in killed_at_each_step(lambda: new.save_pretrained(place)):
        assert not place.exists() or held(place) == after
        shutil.rmtree(place.parent, ignore_errors=True)


@pytest.mark.usefixtures("no_fsync")
def test_killed_anywhere_among_files_of_others(tmp_path):
    """Nothing is replaced, so the folder stays, and has no checkpoint before it has a whole one."""
    place, new = tmp_path / "home", nano_encoder(1)
    place.mkdir()
    (place / "diary").write_text("mine")
    inode = place.stat().st_ino
    after = saved(new, tmp_path / "other") | {"diary": b"mine"}
    whole = set()
    for _ in killed_at_each_step(lambda: new.save_pretrained(place)):
        whole.add("config.json" in (found := held(place)))
        assert found == (after if "config.json" in found else {k: after[k] for k in found.keys() | {"diary"}})
        for name in ("config.json", "model.safetensors"):
            (place / name).unlink(missing_ok=True)
    assert whole == {True, False}
    assert place.stat().st_ino == inode
    assert saved(new, place) == after
    assert not temporaries(tmp_path)


def test_the_files_that_name_others_come_last(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "diary").write_text("mine")

    def run():
        moved = []
        sys.addaudithook(lambda event, args: moved.append(args) if event == "os.rename" else None)
        nano_pipeline(0).save_pretrained(tmp_path / "model", max_shard_size="15KB")
        places = [Path(target).relative_to(tmp_path / "model") for _, target, *_ in moved
                  if "tmp" not in str(target).removeprefix(str(tmp_path))]
        assert places[-1] == Path("model_index.json")
        assert [path.suffix == ".json" for path in places] == sorted(path.suffix == ".json" for path in places)
        assert len(places) > 10

    assert forked(run) == 0


@pytest.mark.usefixtures("no_fsync", "in_two_steps")
def test_killed_anywhere_without_an_exchange(tmp_path):
    """For a moment there is no folder; the next save finds the old one."""
    place, new = tmp_path / "place" / "model", nano_encoder(1)
    before = saved(nano_encoder(0), tmp_path / "old") | {"README.md": b"mine"}
    (tmp_path / "old" / "README.md").write_text("mine")
    shutil.copytree(tmp_path / "old", place)
    after, absent = saved(new, place), 0
    for _ in killed_at_each_step(lambda: new.save_pretrained(place)):
        absent += not place.exists()
        assert not place.exists() or held(place) in (before, after)
        assert saved(new, place) == after
        assert not temporaries(place.parent)
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "old", place)
    assert absent == 1


@pytest.mark.usefixtures("in_two_steps")
def test_an_old_folder_is_put_back(tmp_path, monkeypatch):
    before = saved(nano_encoder(0), tmp_path / "model")
    rename = os.rename

    def refuse(source, target):
        if Path(target).name == "model" and not source.name.endswith("0" * 16):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(KeyboardInterrupt):
        nano_encoder(1).save_pretrained(tmp_path / "model")
    assert held(tmp_path / "model") == before
    assert not temporaries(tmp_path)


def test_nothing_gets_its_name_before_it_is_on_disk(tmp_path):
    """After a power failure a file that was renamed but not synchronised may be empty."""
    nano_encoder(0).save_pretrained(tmp_path / "model")

    def run():
        fsync, synced, wanting = os.fsync, set(), []
        os.fsync = lambda handle: (fsync(handle), synced.add(os.fstat(handle).st_ino))

        def hook(event, args):
            if event == "os.rename" and os.stat(args[0]).st_ino not in synced:
                wanting.append(args)
            if event == "ctypes.dlopen":  # on the way to the exchange
                (new,) = tmp_path.glob(".model.tmp-*[0-9a-f]")
                wanting.extend(path for path in [new, *new.rglob("*")] if path.stat().st_ino not in synced)

        sys.addaudithook(hook)
        nano_encoder(1).save_pretrained(tmp_path / "model")
        assert len(synced) == 4  # two files, the new folder, the one above
        assert not wanting

    assert forked(run) == 0


# Out of disk, out of luck


@pytest.mark.parametrize("safe", [True, False])
def test_a_disk_that_is_full(tmp_path, monkeypatch, safe):
    before = saved(nano_pipeline(0), tmp_path / "model", safe_serialization=safe)

    def full(handle):
        if next(calls) >= allowed:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for good in range(0, 20, 3):
        calls, allowed = itertools.count(), good
        with pytest.raises(CheckpointError, match=r"the disk is full; nothing was changed") as caught:
            nano_pipeline(1).save_pretrained(tmp_path / "model", safe_serialization=safe)
        assert caught.value.path.is_relative_to(tmp_path / "model")
        assert held(tmp_path / "model") == before
        assert not temporaries(tmp_path)


@pytest.mark.parametrize("safe", [True, False])
def test_a_file_that_cannot_grow(tmp_path, safe):
    """The kernel ends a file in the middle of a tensor, in whichever of the formats."""
    before = saved(nano_pipeline(0), tmp_path / "model", safe_serialization=safe)

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
        with pytest.raises(CheckpointError, match=r"larger than is allowed here; nothing was changed") as caught:
            nano_pipeline(1).save_pretrained(tmp_path / "model", safe_serialization=safe)
        assert caught.value.path.parent.parent == tmp_path / "model"

    assert forked(run) == 0
    assert held(tmp_path / "model") == before
    assert not temporaries(tmp_path)


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place, words in ((tmp_path / "file", "a file"), (tmp_path / "file" / "below", "a file is where a folder"),
                         (tmp_path / "file" / "far" / "below", "a file is where a folder")):
        for part in (nano_encoder(0), nano_pipeline(0), imvar.PNDMScheduler()):
            with pytest.raises(CheckpointError, match=words) as caught:
                part.save_pretrained(place)
            assert caught.value.path.is_relative_to(tmp_path / "file")
    assert held(tmp_path) == {"file": b"mine"}


def test_permissions(tmp_path):
    """Where only the folder itself may be written to, it is filled file by file; where not even that, it is refused."""
    place, closed = tmp_path / "above" / "model", tmp_path / "open" / "closed"
    for folder in (place, closed):
        saved(nano_encoder(0), folder, max_shard_size="1KB")
    after, before = saved(nano_encoder(1), tmp_path / "new"), held(closed)
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
            with pytest.raises(CheckpointError, match=r"no permission to write here; nothing was changed"):
                nano_encoder(1).save_pretrained(folder)

    try:
        assert forked(run) == 0
        assert held(place) == after
        assert held(closed) == before
        assert not temporaries(tmp_path)
    finally:
        place.parent.chmod(0o755)
        closed.chmod(0o755)


# What else is there


def equal(a, b):
    return a.state_dict().keys() == b.state_dict().keys() and all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_what_a_save_does_not_replace_stays(tmp_path):
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
    before = held(place)
    with (place / "logs" / "log").open("a") as log:
        nano_pipeline(1).save_pretrained(place)
        log.write("two")
    after = held(place)
    assert after.pop("logs/log") == b"one two"
    kept = {name for name in after if before[name] == after[name]}
    assert kept >= {"README.md", ".git/objects/ab/cd", "unet/notes", "link", "astray",
                    "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"}
    assert {"scheduler/scheduler_config.json", "vae/diffusion_pytorch_model.safetensors"} <= after.keys() - kept
    assert [(place / name).stat().st_mode & 0o777 for name in ("", "logs", "README.md")] == [0o750, 0o700, 0o640]
    assert {path.stat().st_nlink for path in place.rglob("*") if path.is_file()} == {1}
    assert not temporaries(tmp_path)


class Foreign:
    """A part of another library, which writes to its files in place."""

    def __init__(self, meanwhile=lambda: None):
        self.config, self.meanwhile = {}, meanwhile

    def save_pretrained(self, folder, **options):
        Path(folder).mkdir(exist_ok=True)
        with open(Path(folder) / "preprocessor_config.json", "r+") as file:
            assert file.read()
            file.seek(0)
            file.write("{}        ")
        self.meanwhile()


def test_parts_that_write_in_place(tmp_path):
    place = tmp_path / "model"
    before = saved(nano_pipeline(0), place)

    def fail():
        raise RuntimeError("too bad")

    with pytest.raises(RuntimeError, match="too bad"):
        nano_pipeline(1, feature_extractor=Foreign(fail)).save_pretrained(place)
    assert held(place) == before
    nano_pipeline(1, feature_extractor=Foreign()).save_pretrained(place)
    assert (place / "feature_extractor" / "preprocessor_config.json").read_text().startswith("{}")


def test_what_comes_while_saving_stays(tmp_path):
    place = tmp_path / "model"
    nano_pipeline(0).save_pretrained(place)
    (place / "progress").write_text("1 of 2")

    def others():
        (place / "logs" / "deep").mkdir(parents=True)
        (place / "logs" / "deep" / "log").write_text("new")
        (place / "unet" / "notes").write_text("new")
        write_text(place / "progress", "2 of 2")
        write_text(place / "model_index.json", "of a save that did not wait")

    after = saved(nano_pipeline(1, feature_extractor=Foreign(others)), place)
    assert (after["logs/deep/log"], after["unet/notes"], after["progress"]) == (b"new", b"new", b"2 of 2")
    assert json.loads(after["model_index.json"])
    assert not temporaries(tmp_path)


def test_links_to_folders_are_followed(tmp_path):
    before = saved(nano_encoder(0), tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "fresh").symlink_to("made")
    for link in ("link", "fresh"):
        nano_encoder(1).save_pretrained(tmp_path / link)
        assert (tmp_path / link).is_symlink()
        assert equal(nano_encoder(1).from_pretrained(tmp_path / link), nano_encoder(1))
    assert held(tmp_path / "real") != before


def test_links_to_files_are_replaced_not_followed(tmp_path):
    """The hub's cache is made of such links; what they lead to may be part of other checkpoints."""
    before = saved(nano_encoder(0), tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in before:
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{name}")
    nano_encoder(1).save_pretrained(tmp_path / "snapshot")
    assert held(tmp_path / "blobs") == before
    assert equal(nano_encoder(1).from_pretrained(tmp_path / "snapshot"), nano_encoder(1))


def in_place(folder, save):
    """Whether a save, given what stands against replacing the folder, is right, leaves it its inode, and no more."""
    saved(nano_pipeline(0), folder, max_shard_size="1KB")
    (folder / "README.md").write_text("mine")
    inode = folder.stat().st_ino
    save(nano_pipeline(1))
    assert held(folder) == saved(nano_pipeline(1), folder.parent / "other") | {"README.md": b"mine"}
    assert not temporaries(folder.parent)
    return folder.stat().st_ino == inode


@pytest.mark.usefixtures("no_fsync")
def test_where_the_folder_stays(tmp_path, monkeypatch):
    assert not in_place(tmp_path / "a", lambda pipe: pipe.save_pretrained(tmp_path / "a"))
    (tmp_path / "b" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "b" / "below")
    assert in_place(tmp_path / "b", lambda pipe: pipe.save_pretrained(".."))
    (tmp_path / "c").mkdir()
    os.mkfifo(tmp_path / "c" / "pipe")
    assert in_place(tmp_path / "c", lambda pipe: pipe.save_pretrained(tmp_path / "c"))
    with monkeypatch.context() as patch:
        patch.setattr(folders, "MANY", 3)
        assert in_place(tmp_path / "d", lambda pipe: pipe.save_pretrained(tmp_path / "d"))
    with monkeypatch.context() as patch:

        def refuse(*paths):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        patch.setattr(os, "link", refuse)
        assert in_place(tmp_path / "e", lambda pipe: pipe.save_pretrained(tmp_path / "e"))
    with monkeypatch.context() as patch:
        patch.setattr(swapping, "rename_exchange", refuse)
        assert in_place(tmp_path / "f", lambda pipe: pipe.save_pretrained(tmp_path / "f"))


def mount(kind, source, target, options=None):
    """Mount in a name space of this process alone; False where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, bind, recursive, private = 1 << 17, 1 << 28, 1 << 12, 1 << 14, 1 << 18
    return not (libc.unshare(new_mounts if ROOT else new_mounts | new_user)
                or libc.mount(b"none", b"/", None, recursive | private, None)
                or libc.mount(os.fsencode(source), os.fsencode(target), kind, 0 if kind else bind, options))


@pytest.mark.parametrize("kind", [b"tmpfs", None], ids=["another", "bind"])
@pytest.mark.parametrize("where", ["model", "model/unet", "model/data set/x"])
def test_mount_points(tmp_path, kind, where):
    (tmp_path / where).mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    mine = {"model": {"mine": b"mine"}, "model/unet": {"unet/mine": b"mine"}}.get(where, {})

    def run():
        if not mount(kind, tmp_path / "elsewhere", place := tmp_path / where):
            folders.mounted = lambda folder, within=False: place == folder or (within and place.is_relative_to(folder))
        if mine:
            (tmp_path / where / "mine").write_text("mine")
        made = []
        sys.addaudithook(lambda event, args: made.append(Path(args[0])) if event == "os.mkdir" else None)
        nano_pipeline(0).save_pretrained(tmp_path / "model", max_shard_size="1KB")
        inode = (tmp_path / where).stat().st_ino
        after = saved(nano_pipeline(1), tmp_path / "model")
        assert (tmp_path / where).stat().st_ino == inode
        # whether it was written beside the folder, rather than inside, on the same file system
        assert any(path.parent == tmp_path and ".tmp-" in path.name for path in made) == (where != "model")
        assert after == saved(nano_pipeline(1), tmp_path / "other") | mine
        assert not temporaries(tmp_path)

    assert forked(run) == 0


def test_a_small_disk(tmp_path):
    """A file system with room for one checkpoint and a half."""
    def run():
        one = sum(map(len, saved(nano_pipeline(0), tmp_path / "measure").values()))
        if not mount(b"tmpfs", "none", tmp_path, f"size={2 * one}".encode()):
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
        before = saved(nano_pipeline(0), tmp_path / "model")
        with pytest.raises(CheckpointError, match=r"the disk is full|larger than is allowed"):
            nano_pipeline(1).save_pretrained(tmp_path / "model")
        assert held(tmp_path / "model") == before
        assert not temporaries(tmp_path)

    assert forked(run) == 0


# Beside others


def test_the_folder_that_the_weights_are_mapped_from(tmp_path):
    before = nano_encoder(0)
    before.save_pretrained(tmp_path)
    model = before.from_pretrained(tmp_path)
    other = before.from_pretrained(tmp_path)
    with torch.no_grad():
        model.proj.weight += 1
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert equal(other, before)
    assert equal(before.from_pretrained(tmp_path), model)


@pytest.mark.usefixtures("no_fsync")
def test_readers_see_one_save_or_say_so(tmp_path):
    """While two checkpoints are saved by turns, each load is wholly the one or the other."""
    pipes = [nano_pipeline(0), nano_pipeline(1)]
    pipes[0].save_pretrained(tmp_path / "model")

    def write():
        for turn in itertools.count(1):
            if (tmp_path / "enough").exists():
                return
            pipes[turn % 2].save_pretrained(tmp_path / "model")
            time.sleep(0.05)

    def read():
        found = []
        while len(found) < 10 or set(found) != {0, 1}:
            try:
                pipe = StableDiffusionImageVariationPipeline.from_pretrained(tmp_path / "model")
            except CheckpointError as error:
                if "was changed while it was being read" not in str(error):
                    raise
            else:
                found.append(pipe.scheduler.config.steps_offset)
                assert all(equal(getattr(pipe, part), getattr(pipes[found[-1]], part)) for part in pipe.modules)

    writer = os.fork()
    if not writer:
        os._exit(forked(write))
    try:
        read()
    finally:
        (tmp_path / "enough").touch()
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
    with pytest.raises(CheckpointError, match="was changed while it was being read") as caught:
        Unlucky.from_pretrained(tmp_path)
    assert caught.value.path == tmp_path


@pytest.mark.usefixtures("no_fsync")
def test_loading_in_threads(tmp_path):
    pipe = nano_pipeline(0)
    pipe.save_pretrained(tmp_path)
    found = []
    threads = [threading.Thread(target=lambda: found.append(pipe.from_pretrained(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [equal(each.unet, pipe.unet) for each in found] == [True] * 4


def test_a_lock_is_on_the_file_that_others_find(tmp_path):
    """Whoever has waited for a lock finds that its file is gone; a third would lock another."""
    def wait():
        with swapping.locked(tmp_path / "lock") as sole:
            found.append(sole and (tmp_path / "lock").exists())

    found, second = [], threading.Thread(target=wait)
    with swapping.locked(tmp_path / "lock"):
        second.start()
        time.sleep(0.2)
    second.join()
    assert found == [True]
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("there", [True, False])
def test_saves_of_one_folder_wait_for_each_other(tmp_path, there):
    """Without that, shards of the one would lie beside the index of the other."""
    place = tmp_path / "model"
    options = [{"max_shard_size": "10KB"}, {}]
    after = [saved(nano_pipeline(i), tmp_path / f"{i}", **options[i]) for i in range(2)]
    for _ in range(3):
        if there:
            nano_pipeline(2).save_pretrained(place)
        children = []
        for i in range(2):
            child = os.fork()
            if not child:
                os._exit(forked(lambda i=i: nano_pipeline(i).save_pretrained(place, **options[i])))
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        assert held(place) in after
        assert not temporaries(tmp_path)
        shutil.rmtree(place)


@pytest.mark.usefixtures("no_fsync")
def test_threads_saving_one_folder(tmp_path):
    after = [saved(nano_encoder(i), tmp_path / f"{i}") for i in range(3)]
    threads = [threading.Thread(target=nano_encoder(i).save_pretrained, args=[tmp_path / "model"]) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held(tmp_path / "model") in after
    assert not temporaries(tmp_path)


# Files of tensors


def every_kind():
    base = torch.arange(24.0)
    kinds = ("bfloat16", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool", "float8_e4m3fn")
    return {"matrix": torch.randn(3, 4), 'an "é"\n': torch.randn(2), "scalar": torch.tensor(3.0),
            "empty": torch.zeros(0, 3), "turned": torch.randn(4, 5).T, "whole": base, "half": base[:12],
            "end": base[9:], "again": base[:12], "gradient": torch.nn.Parameter(torch.randn(3)),
            "expanded": torch.ones(1).expand(7)} | {kind: torch.ones(3).to(getattr(torch, kind)) for kind in kinds}


def test_the_bytes_that_safetensors_writes(tmp_path):
    for tensors in (every_kind(), {}, {"one": torch.ones(1)}):
        seen = []
        written = write_tensors(tmp_path / "ours.safetensors", tensors, on_bytes=seen.append, digest=True)
        alone = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        save_file(alone, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
        ours, theirs = ((tmp_path / f"{whose}.safetensors").read_bytes() for whose in ("ours", "theirs"))
        assert ours == theirs
        assert written.path == tmp_path / "ours.safetensors"
        assert (written.tensors, written.bytes, sum(seen)) == (len(tensors), len(ours), len(ours))
        assert written.sha256 == hashlib.sha256(ours).hexdigest()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_pickles_hold_no_more_than_their_tensors(tmp_path, dtype):
    written = write_tensors(tmp_path / "ours.bin", every_kind(), dtype=dtype, digest=True)
    content = (tmp_path / "ours.bin").read_bytes()
    assert (written.bytes, written.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    for name, tensor in torch.load(tmp_path / "ours.bin", weights_only=True).items():
        wanted = every_kind()[name]
        assert tensor.dtype == ((dtype or wanted.dtype) if wanted.is_floating_point() else wanted.dtype)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_casting(tmp_path):
    tensors = {"w": torch.tensor([1.0, 65504.0, -3e-9]), "n": torch.arange(3), "inf": torch.tensor([float("inf"), 1])}
    write_tensors(tmp_path / "half.safetensors", tensors, dtype=torch.float16)
    half = load_file(tmp_path / "half.safetensors")
    assert {name: tensor.dtype for name, tensor in half.items()} == {
        "w": torch.float16, "inf": torch.float16, "n": torch.int64}
    assert all(torch.equal(half[name], tensors[name].to(half[name].dtype)) for name in tensors)
    for ending in ("safetensors", "bin"):
        for bad, words in (({"w": torch.tensor([1e6])}, r"w: .*beyond torch\.float16"),
                           ({"w": torch.ones(2, device="meta")}, r"w: .*meta"),
                           ({"w": torch.eye(2).to_sparse()}, "dense")):
            with pytest.raises(InputError, match=words):
                write_tensors(tmp_path / f"bad.{ending}", bad, dtype=torch.float16)
    with pytest.raises(TypeError, match=r"c: .*complex64"):
        write_tensors(tmp_path / "bad.safetensors", {"c": torch.ones(1, dtype=torch.complex64)})
    assert [path.name for path in tmp_path.iterdir()] == ["half.safetensors"]


@pytest.mark.usefixtures("no_fsync")
def test_shards_are_measured_as_they_are_written(tmp_path):
    tensors = {f"w{i}": torch.ones(1000) for i in range(8)}
    for dtype, shards in ((None, 4), (torch.float16, 2), (torch.float64, 8)):
        written = write_weights(tmp_path, DIFFUSERS, tensors, max_shard_size="8KB", dtype=dtype)
        assert len(written) == shards == len(list(tmp_path.glob("*.safetensors")))
        assert sum(each.tensors for each in written) == 8
        index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 8000 * (dtype or torch.float32).itemsize
    (whole,) = write_weights(tmp_path, DIFFUSERS, tensors, max_shard_size="1.5 MB")
    assert [whole.path] == list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", ["10", "10 XB", "much", "-1GB", "0GB", 0, -5, True, None, float("nan"), 1e999, [1]])
def test_shard_sizes_that_are_none(tmp_path, bad):
    with pytest.raises(InputError, match="max_shard_size"):
        nano_encoder(0).save_pretrained(tmp_path / "model", max_shard_size=bad)
    assert not list(tmp_path.iterdir())


def test_memory_is_that_of_one_tensor(tmp_path):
    """64 MB as float32, of which 32 MB would be a copy in half precision."""
    tensors = {f"w{i}": torch.randn(2**19) for i in range(32)}

    def private():
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) / 1024

    for dtype in (None, torch.float16):
        most, before = 0.0, private()

        def look(_):
            nonlocal most
            most = max(most, private())

        write_tensors(tmp_path / "w.safetensors", tensors, dtype=dtype, on_bytes=look)
        assert before / 2 < most < before + 8


def test_permission_bits_follow_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        nano_pipeline(0).save_pretrained(tmp_path / "model")
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {0o640}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_dir()} == {0o750}


def test_a_block_that_fails_changes_nothing(tmp_path):
    def fail():
        with replaced(tmp_path / "new" / "folder") as new:
            (new / "file").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list((tmp_path / "new").iterdir())
