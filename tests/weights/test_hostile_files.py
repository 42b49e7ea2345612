"""Weights that are not what their name says, or lie elsewhere: refused soon, with the reason."""

import json
import os
import shutil

import pytest

from imvar import StableDiffusionImageVariationPipeline
from tests.support.refusals import CLASSES, LFS, every_part, refuses, refuses_part, weights


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda whole: b"", "got an empty file"),
        (lambda whole: b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "a web page"),
        (lambda whole: LFS, "got a git-lfs pointer; run `git lfs pull`"),
        (lambda whole: whole[:-1], "cut short at"),
        (lambda whole: whole[:1000], "cut short at 1000 bytes, of which the header alone has"),
        (lambda whole: whole[:9], "does not begin as such"),
        (lambda whole: (2**63).to_bytes(8, "little") + whole[8:], "does not begin as such"),
        (lambda whole: bytes(5000), "does not begin as such"),
        (lambda whole: whole + b"x", "expected a safetensors file, got an error"),
        (lambda whole: framed(b'{"a":' * 100_000), "expected valid JSON"),
        (lambda whole: framed(b'{"a": "\xff"}'), "expected valid JSON"),
        (
            lambda whole: framed(
                json.dumps(
                    {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**4)}
                ).encode()
            ),
            "expected at most 8192 tensors, got 10000",
        ),
        (lambda whole: doubled_key(whole), "the duplicate key"),
        (lambda whole: changed(whole, data_offsets=[0, 2**62]), "cut short"),
        (lambda whole: changed(whole, data_offsets=[8, 4]), "expected a safetensors file, got an error"),
        (lambda whole: changed(whole, shape=[2**40, 2**40]), "expected a safetensors file, got an error"),
        (lambda whole: changed(whole, dtype="F7"), "expected a safetensors file, got an error"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@every_part
def test_safetensors(folder, part, content, words):
    file = weights(folder, part)
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(content(whole))
    refuses_part(folder, part, file, words)


def framed(header, data=b""):
    return len(header).to_bytes(8, "little") + header + data


def parts_of(whole):
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def changed(whole, **entries):
    header, data = parts_of(whole)
    header[max(header)] |= entries
    return framed(json.dumps(header).encode(), data)


def doubled_key(whole):
    header, data = parts_of(whole)
    name = json.dumps(max(header))
    twice = f'{{{name}: {{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, '
    return framed(json.dumps(header).replace("{", twice, 1).encode(), data)


@pytest.mark.parametrize("file", ["config.json", "weights"])
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("folder", "expected a file, got a folder"),
        ("pipe", "expected a file, got a special file"),
        ("out", "expected a path in .*, got one that leads to"),
        ("device", "got one that leads to /dev/zero"),
        ("loop", "expected a file, got Symlink loop|got one that leads to|expected a readable file"),
    ],
)
@every_part
def test_what_is_no_file_in_the_folder(folder, part, file, what, words):
    file = weights(folder, part) if file == "weights" else folder / part / file
    file.rename(folder.parent / "outside")
    if what == "folder":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to({"out": folder.parent / "outside", "device": "/dev/zero", "loop": file}[what])
    refuses_part(folder, part, file, words)


@every_part
def test_a_part_that_lies_elsewhere(folder, part):
    (folder / part).rename(folder.parent / "outside")
    (folder / part).symlink_to(folder.parent / "outside")
    refuses(
        lambda: StableDiffusionImageVariationPipeline.from_pretrained(folder), folder / part, "got one that leads to"
    )
    CLASSES[part].from_pretrained(folder, subfolder=part)  # the folder that a caller names may be a link


def test_the_cache_of_the_hub_is_made_of_links(folder, tmp_path):
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    shutil.copytree(folder, snapshot)
    blobs.mkdir()
    for number, file in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
        file.rename(blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))
    StableDiffusionImageVariationPipeline.from_pretrained(snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    StableDiffusionImageVariationPipeline.from_pretrained(tmp_path / "link")
    blob = weights(snapshot, "unet").resolve()
    blob.rename(tmp_path / "outside")
    blob.symlink_to(tmp_path / "outside")
    refuses(
        lambda: StableDiffusionImageVariationPipeline.from_pretrained(snapshot),
        weights(snapshot, "unet"),
        "got one that leads to",
    )
