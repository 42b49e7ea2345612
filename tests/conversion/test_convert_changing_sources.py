"""Sources that change while they are converted: the result is of one save, or an error and the target is unchanged."""

from __future__ import annotations

import itertools
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

import imvar
from imvar import CheckpointError
from imvar.conversion import convert
from imvar.conversion.layouts import DiffusersLayout, OriginalLayout, is_identical
from imvar.weights.mapped import copy_mapped
from imvar.weights.single_file import SingleFile
from tests.support.crashes import nano_pipeline, read_files, run_and_exit, run_in_child

LAYOUTS = {"folder": "diffusers", "model.safetensors": "original"}


def converted(seed, folder, name):
    """Return the content of the target for a source with this seed."""
    nano_pipeline(seed).save_pretrained(folder / f"source of {seed}")
    convert(folder / f"source of {seed}", folder / f"target of {seed}" / name, to=LAYOUTS[name])
    return read_files(folder / f"target of {seed}")


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("name", LAYOUTS)
def test_while_another_process_saves(tmp_path, name):
    source, target, stop = tmp_path / "source", tmp_path / "target" / name, tmp_path / "stop"
    expected = [converted(seed, tmp_path, name) for seed in (0, 1)]
    nano_pipeline(0).save_pretrained(source)

    def save():
        for turn in itertools.count(1):
            if stop.exists():
                return
            nano_pipeline(turn % 2).save_pretrained(source)
            time.sleep(0.15 * (turn % 5))  # sometimes during a conversion

    def convert_often():
        found, end = [], time.monotonic() + 2
        while time.monotonic() < end or set(found) != {0, 1}:
            before = read_files(target.parent)
            try:
                convert(source, target, to=LAYOUTS[name], verify=len(found) % 2 == 0)
            except CheckpointError as error:
                if "expected files that stay the same while they are read, got changes" not in str(error):
                    raise
                assert read_files(target.parent) == before
            else:
                found.append(expected.index(read_files(target.parent)))

    child = os.fork()
    if not child:
        run_and_exit(save)
    try:
        convert_often()
    finally:
        stop.touch()
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_save_during_the_conversion(tmp_path, name):
    """Saved into is the source after its inspection; or the checkpoint that completes it, or that of the configs."""
    expected, target = converted(1, tmp_path, name), tmp_path / "target" / name

    def save(line):
        if line.startswith("target: ") and saves:
            nano_pipeline(saves.pop()).save_pretrained(tmp_path / "source")

    for options in ({}, {"fill": tmp_path / "source"}, {"config": tmp_path / "source"}):
        nano_pipeline(0).save_pretrained(tmp_path / "source")
        source = tmp_path / "source"
        if "config" in options:
            source = tmp_path / "source of 1"
            nano_pipeline(1).save_pretrained(tmp_path / "source")
            imvar.PNDMScheduler(steps_offset=7).save_pretrained(tmp_path / "source" / "scheduler")
        if "fill" in options:
            source = shutil.copytree(tmp_path / "source of 1", tmp_path / "incomplete")
            shutil.rmtree(source / "unet")
        saves = [1]
        convert(source, target, to=LAYOUTS[name], log=save, **options)
        assert read_files(target.parent) == expected
    saves = [0, 1] * 3
    with pytest.raises(CheckpointError, match=r"expected files that stay the same .* got changes during each of 5"):
        convert(tmp_path / "source", target, to=LAYOUTS[name], log=save)
    assert read_files(target.parent) == expected


# In place


def unet_values():
    """Return a tensor of the UNet, and others of its shape."""
    values = nano_pipeline(0).unet.conv_out.weight.detach()
    return values, -values, values / 0


VALUES = unet_values()


def encode(tensor):
    return tensor.numpy().tobytes()


@pytest.fixture(params=["folder", "pickles", "model.safetensors", "model.ckpt"])
def source(request, tmp_path):
    """A source of each kind, the file in it that contains the UNet, and the options to convert it."""
    kind, folder = request.param, tmp_path / "folder"
    nano_pipeline(0).save_pretrained(folder, safe_serialization=kind != "pickles")
    if kind.startswith("model"):
        convert(folder, tmp_path / "model.safetensors", to="original")
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "model.ckpt")
        return tmp_path / kind, tmp_path / kind, {"config": folder}
    return folder, next((folder / "unet").glob("*.bin" if kind == "pickles" else "*.safetensors")), {}


def rewrite(file, values, *, restore_time):
    """Write `values` in place of the first tensor in `VALUES` that the file contains."""
    status, content = file.stat(), file.read_bytes()
    position = max(content.find(encode(old)) for old in VALUES)
    with file.open("r+b") as opened:
        opened.seek(position)
        opened.write(encode(values))
    if restore_time:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def after(monkeypatch, stage, change):
    """Make a stage of the conversion call `change` at its end."""
    real = getattr(DiffusersLayout, stage)
    monkeypatch.setattr(DiffusersLayout, stage, lambda *args: [real(*args), change()][0])


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("restore_time", [True, False])
@pytest.mark.parametrize("changed", VALUES[1:], ids=["finite", "infinite"])
def test_rewritten_between_check_and_write(source, tmp_path, monkeypatch, changed, restore_time):
    source, file, options = source
    nano_pipeline(1).save_pretrained(tmp_path / "target")
    before = read_files(tmp_path / "target")
    values = itertools.cycle([changed, VALUES[0]])  # so that each attempt finds a change
    after(monkeypatch, "check_values", lambda: rewrite(file, next(values), restore_time=restore_time))
    words = "got new values" if restore_time else "got changes during each of 5 attempts|expected finite values"
    with pytest.raises(CheckpointError, match=words) as caught:
        convert(source, tmp_path / "target", **options)
    assert caught.value.path == (file if restore_time or "finite" in str(caught.value) else source)
    assert read_files(tmp_path / "target") == before


@pytest.mark.usefixtures("no_fsync")
def test_rewritten_before_verifying(source, tmp_path, monkeypatch):
    source, file, options = source
    real = DiffusersLayout.verify

    def verify(*args):
        rewrite(file, VALUES[1], restore_time=True)
        real(*args)

    monkeypatch.setattr(DiffusersLayout, "verify", verify)
    with pytest.raises(CheckpointError, match="got new values") as caught:
        convert(source, tmp_path / "target", verify=True, **options)
    assert caught.value.path == file
    assert not (tmp_path / "target").exists()


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("stage", ["check_space", "check_values"])
@pytest.mark.parametrize("to", LAYOUTS.values())
def test_cut_short_before_or_after_the_check(source, tmp_path, stage, to):
    """Mapped memory behind the end of a file cannot be read, so the process would be killed."""
    source, file, options = source
    target = tmp_path / "target" / ("model.safetensors" if to == "original" else "")
    convert(source, target, to=to, **options)
    before = read_files(tmp_path / "target")

    def run():
        layout = OriginalLayout if to == "original" else DiffusersLayout
        with pytest.MonkeyPatch.context() as patch:
            real = getattr(layout, stage)
            patch.setattr(layout, stage, lambda *args: [real(*args), os.truncate(file, 100)][0])
            with pytest.raises(CheckpointError) as caught:
                convert(source, target, to=to, **options)
        assert caught.value.path == file

    assert run_in_child(run) == 0
    assert read_files(tmp_path / "target") == before


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("source", ["model.safetensors", "model.ckpt"], indirect=True)
def test_cut_short_while_it_is_inspected(source, tmp_path):
    """Some matrices are transposed there."""
    source, file, options = source

    def run():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SingleFile, "check_no_unknown", lambda self: os.truncate(file, 100))
            with pytest.raises(CheckpointError) as caught:
                convert(source, tmp_path / "target", **options)
        assert caught.value.path == file

    assert run_in_child(run) == 0
    assert not (tmp_path / "target").exists()


def test_copies_of_mapped_tensors():
    for tensor in (
        torch.randn(3, 70_000),
        torch.randn(4, 5).T,
        torch.arange(24.0)[3:9],
        torch.arange(24.0).view(4, 6)[:, 2],
        torch.tensor(3.0),
        torch.zeros(0, 3),
        torch.ones(1).expand(7),
        torch.randn(5).bfloat16(),
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.nn.Parameter(torch.randn(3)),
    ):
        copy = copy_mapped(tensor)
        assert is_identical(copy, tensor.detach())
        assert copy.stride() == tensor.stride()
        assert copy.data_ptr() != tensor.data_ptr() or not tensor.numel()
