"""Checkpoints on a hub as the source of a conversion."""

import filecmp
import shutil

import pytest

from imvar.cli import main
from tests.support.loopback_hub import environment, run, serve


@pytest.fixture
def hub(checkpoint, small, tmp_path):
    """A hub with a repository of a folder in the published layout, and one of an original file."""
    folder, old = tmp_path / "hub" / "folder", tmp_path / "hub" / "old"
    shutil.copytree(checkpoint, folder)
    shutil.copytree(checkpoint / "vae", old / "vae")
    shutil.copy(folder / "unet" / "config.json", folder / "README.md")
    shutil.copy(small, folder / "original.ckpt")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"other weights")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"the same weights")
    (tmp_path / "hub" / "file").mkdir()
    shutil.copy(small, tmp_path / "hub" / "file" / "small.safetensors")
    with serve() as hub:
        hub.repositories = {
            "someone/model": {"main": folder, "v1.0": old},
            "someone/file": {"main": tmp_path / "hub" / "file"},
        }
        yield hub


@pytest.fixture
def convert(hub, tmp_path):
    """Return a function that runs `imvar convert` in a process of its own and returns what was printed."""

    def convert(*args, status=0):
        done = run("-m", "imvar", "convert", *args, env=environment(hub.address, tmp_path), cwd=tmp_path)
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    return convert


def test_a_repository_and_a_file(convert, hub, checkpoint, tmp_path):
    """Fetched is what is read: the plain safetensors of each part."""
    convert("someone/model", "out", "--verify")
    assert sorted(hub.fetched) == sorted(
        f"someone/model/{path.relative_to(checkpoint).as_posix()}" for path in checkpoint.rglob("*") if path.is_file()
    )
    hub.fetched.clear()
    report = convert("someone/file/small.safetensors", "same", "--fill", "someone/model")
    assert "filled from" in report
    assert hub.fetched == ["someone/file/small.safetensors"]
    assert main(["convert", str(checkpoint), str(tmp_path / "local")]) == 0
    names = [path.relative_to(tmp_path / "local") for path in (tmp_path / "local").rglob("*.safetensors")]
    assert len(names) == 4
    for other in "out", "same":
        assert filecmp.cmpfiles(tmp_path / "local", tmp_path / other, names, shallow=False)[0] == names


def test_one_part_of_a_revision(convert, hub):
    convert("someone/model", "out", "--part", "vae", "--revision", "v1.0")
    assert {name.rpartition("/")[0] for name in hub.fetched} == {"someone/model/vae"}
    assert "expected a folder unet, got none" in convert(
        "someone/model", "out", "--part", "unet", "--revision", "v1.0", status=1
    )


def test_there_is_no_such_repository(convert):
    (line,) = convert("no/where", "out", status=1).splitlines()
    assert line.startswith("imvar: no/where: expected a repository on the hub")


def test_a_local_checkpoint_has_no_revision(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(checkpoint), str(tmp_path / "out"), "--revision", "v1.0"])
    assert f"--revision: expected none for the local checkpoint {checkpoint}, got 'v1.0'" in capsys.readouterr().err


def test_a_bundled_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "imvar-emoji", "out", "--dry-run"]) == 0
    assert "a folder in diffusers' layout" in capsys.readouterr().out.splitlines()[0]
