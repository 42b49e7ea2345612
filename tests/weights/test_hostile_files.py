"""Weights files with other content or outside the checkpoint's folder are refused quickly, with the reason."""

import json
import os
import shutil

import pytest

from imvar import StableDiffusionImageVariationPipeline
from tests.support.refusals import CLASSES, LFS, assert_part_refused, assert_refused, every_part, weights


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda original: b"", "got an empty file"),
        (lambda original: b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "a web page"),
        (lambda original: LFS, "got a git-lfs pointer; run `git lfs pull`"),
        (lambda original: original[:-1], "cut short at"),
        (lambda original: original[:1000], "cut short at 1000 bytes, of which the header alone has"),
        (lambda original: original[:9], "does not begin as such"),
        (lambda original: (2**63).to_bytes(8, "little") + original[8:], "does not begin as such"),
        (lambda original: bytes(5000), "does not begin as such"),
        (lambda original: original + b"x", "expected a safetensors file, got an error"),
        (lambda original: framed(b'{"a":' * 100_000), "expected valid JSON"),
        (lambda original: framed(b'{"a": "\xff"}'), "expected valid JSON"),
        (
            lambda original: framed(
                json.dumps(
                    {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**4)}
                ).encode()
            ),
            "expected at most 8192 tensors, got 10000",
        ),
        (lambda original: doubled_key(original), "the duplicate key"),
        (lambda original: changed(original, data_offsets=[0, 2**62]), "cut short"),
        (lambda original: changed(original, data_offsets=[8, 4]), "expected a safetensors file, got an error"),
        (lambda original: changed(original, shape=[2**40, 2**40]), "expected a safetensors file, got an error"),
        (lambda original: changed(original, dtype="F7"), "expected a safetensors file, got an error"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@every_part
def test_safetensors(folder, part, content, words):
    file = weights(folder, part)
    original = file.read_bytes()
    file.unlink()
    file.write_bytes(content(original))
    assert_part_refused(folder, part, file, words)


def framed(header, data=b""):
    return len(header).to_bytes(8, "little") + header + data


def parts_of(original):
    length = int.from_bytes(original[:8], "little")
    return json.loads(original[8 : 8 + length]), original[8 + length :]


def changed(original, **entries):
    header, data = parts_of(original)
    header[max(header)] |= entries
    return framed(json.dumps(header).encode(), data)


def doubled_key(original):
    header, data = parts_of(original)
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
        ("loop", "expected a valid path, got Symlink loop|got one that leads to|expected a readable file"),
    ],
)
@every_part
def test_paths_that_are_not_files_in_the_folder(folder, part, file, what, words):
    file = weights(folder, part) if file == "weights" else folder / part / file
    file.rename(folder.parent / "outside")
    if what == "folder":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to({"out": folder.parent / "outside", "device": "/dev/zero", "loop": file}[what])
    assert_part_refused(folder, part, file, words)


@every_part
def test_a_part_outside_the_folder(folder, part):
    (folder / part).rename(folder.parent / "outside")
    (folder / part).symlink_to(folder.parent / "outside")
    assert_refused(
        lambda: StableDiffusionImageVariationPipeline.from_pretrained(folder), folder / part, "got one that leads to"
    )
    CLASSES[part].from_pretrained(folder, subfolder=part)  # the folder passed by the caller may be a link


def test_the_cache_of_the_hub_consists_of_links(folder, tmp_path):
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
    inner = repository / "snapshots" / "models--owner--other" / "snapshots" / "abc"
    shutil.copytree(snapshot, inner)
    weights(inner, "unet").unlink()
    (inner / "unet" / weights(snapshot, "unet").name).symlink_to(weights(snapshot, "unet").resolve())
    assert_refused(  # the innermost repository is the limit
        lambda: StableDiffusionImageVariationPipeline.from_pretrained(inner),
        weights(inner, "unet"),
        "got one that leads to",
    )
    blob = weights(snapshot, "unet").resolve()
    blob.rename(tmp_path / "outside")
    blob.symlink_to(tmp_path / "outside")
    assert_refused(
        lambda: StableDiffusionImageVariationPipeline.from_pretrained(snapshot),
        weights(snapshot, "unet"),
        "got one that leads to",
    )
