"""Digests of files, which are kept, and of pixels."""

import hashlib
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import imvar
from imvar.records import digests
from imvar.records.digests import file_digest, pixels_digest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache file, for files of any size."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "MIN_KEPT", 0)
    return tmp_path / "cache" / "imvar" / "digests.json"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    make_older(path, 10)
    return path


def make_older(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_a_digest_is_computed_once(cache, file, monkeypatch):
    assert file_digest(file) == sha256(b"one")
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("computed again"))
        assert file_digest(file) == file_digest(os.path.relpath(file)) == sha256(b"one")
    file.write_bytes(b"two")
    make_older(file, 5)
    assert file_digest(file) == sha256(b"two")


def test_a_file_that_has_just_changed_is_read(cache, file):
    """Two changes within the resolution of the clock leave size and time the same."""
    assert file_digest(file) == sha256(b"one")
    stat = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, time.time_ns() - 10**9))
    assert file_digest(file) == sha256(b"two")
    state = file.stat()
    file.write_bytes(b"six")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert file_digest(file) == sha256(b"six")
    assert "six" not in cache.read_text()
    make_older(file, -100)  # the clock may have been set back
    file_digest(file)
    assert str(file) in cache.read_text()
    assert json.loads(cache.read_text())[str(file)][2] == sha256(b"one")


def test_a_file_that_changes_while_it_is_read_is_not_kept(cache, file, monkeypatch):
    compute = hashlib.file_digest

    def change_and_compute(*args):
        file.write_bytes(b"three")
        return compute(*args)

    monkeypatch.setattr(hashlib, "file_digest", change_and_compute)
    file_digest(file)
    assert not cache.exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 10_000, '{"PATH": 3}', '{"PATH": [3, "x", "y"]}', '{"PATH": [3, 0, ""]}', "\0"]
)
def test_a_broken_cache_is_replaced(cache, file, text):
    cache.parent.mkdir(parents=True)
    cache.write_text(text.replace("PATH", str(file)))
    assert file_digest(file) == sha256(b"one")
    assert json.loads(cache.read_text()).keys() == {str(file)}


def test_a_cache_that_cannot_be_written_does_no_harm(cache, file):
    cache.parent.parent.write_text("a file in place of the folder")
    assert file_digest(file) == file_digest(file) == sha256(b"one")


def test_the_cache_stays_small(cache, file, monkeypatch):
    monkeypatch.setattr(digests, "MAX_KEPT", 2)
    others = [file.with_name(name) for name in "abc"]
    for other in others:
        other.write_bytes(b"x")
        make_older(other, 10)
        file_digest(other)
    assert list(json.loads(cache.read_text())) == [str(other) for other in others[1:]]


def test_small_files_are_not_noted(cache, file, monkeypatch):
    """The cache is not a list of the user's photos."""
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    assert file_digest(file) == sha256(b"one")
    assert not cache.exists()


def test_processes_share_the_cache(cache, file):
    """A reader finds whole JSON while three processes write."""
    code = (
        "import sys; from imvar.records import digests; digests.MIN_KEPT = 0\n"
        "for _ in range(100): digests.keep(sys.argv[1], [1, 2, 'a' * 64])"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, f"/{name}"]) for name in "ab"]
    while any(writer.poll() is None for writer in writers):
        if cache.exists():
            assert json.loads(cache.read_text()).keys() <= {"/a", "/b"}
    assert [writer.returncode for writer in writers] == [0, 0]
    assert json.loads(cache.read_text())


@pytest.mark.parametrize("make", [lambda path: path / "none", lambda path: path], ids=["missing", "a folder"])
def test_what_cannot_be_read_is_an_error(tmp_path, make):
    with pytest.raises(imvar.InputError, match="expected a readable file, got"):
        file_digest(make(tmp_path))


def test_digests_of_pixels():
    image = Image.effect_noise((9, 5), 90).convert("RGB")
    digest = pixels_digest(image)
    assert digest == sha256(b"RGB 9x5\n" + image.tobytes())
    assert digest != pixels_digest(image.resize((5, 9)))
    palette = image.quantize(4)
    assert pixels_digest(palette) == pixels_digest(palette.convert("RGB")) != digest
    tensor = torch.arange(6.0)
    different = [tensor, tensor.view(2, 3), tensor.view(3, 2), tensor.double(), tensor.bfloat16(), -tensor, tensor > 2]
    assert len({pixels_digest(value) for value in different}) == len(different)
    assert pixels_digest(tensor.view(2, 3).T) == pixels_digest(tensor.view(2, 3).T.contiguous())
    assert pixels_digest(np.arange(6, dtype=np.float32)) == pixels_digest(tensor)
