"""The inputs of a batch: what they may be, which ids they have, and how they are refused."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from imvar import InputError, batch
from tests.support.batches import DRAWINGS, Stub, drawing, errors_of, items, make_shards, save_drawings, write_lines

PNG = ("id", "image")


def ids(*args, **settings):
    return [item["id"] for item in items(*args, **settings)]


def png(name):
    file = io.BytesIO()
    drawing(name).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def write_parquet(path, columns, row_group_size=None):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


# ---- folders, patterns and files


def test_a_folder_with_its_folders_in_natural_order(tmp_path):
    photos = tmp_path / "photos"
    for name in ("10.png", "9.PNG", "b/2.jpg", "a/1.webp", ".hidden.png", ".git/x.png", "notes.txt", "b/._2.jpg"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(b"")
    (photos / "c.png").mkdir()
    found = items(photos, tmp_path / "out")
    assert [item["id"] for item in found] == ["9.PNG", "10.png", "a/1.webp", "b/2.jpg"]
    assert [item["image"] for item in found] == [str(photos / item["id"]) for item in found]


def test_patterns_and_files_have_their_paths_as_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/10.png", "a/9.png", "b/9.png", "b/c/1.png", "one [2].jpg", "e.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert ids("*/*.png", "out") == ["a/9.png", "a/10.png", "b/9.png"]
    assert ids("**/[19].png", "out") == ["a/9.png", "b/9.png", "b/c/1.png"]
    assert ids(["one [2].jpg", "e.safetensors", tmp_path / "a/9.png"], "out") == [
        "one [2].jpg",
        "e.safetensors",
        "9.png",
    ]
    assert ids("./a/../b/9.png", "out") == ["9.png"]


@pytest.mark.parametrize("name", ["nothing", "nothing/*.png", "empty", "empty/*"])
def test_inputs_without_images(name, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=rf"{re.escape(name)}: expected .*, got (none|no such file)"):
        batch.plan(tmp_path / name, tmp_path / "out")
    assert os.listdir(tmp_path) == ["empty"]


def test_a_folder_that_cannot_be_read(tmp_path):
    closed = save_drawings(tmp_path / "photos" / "closed")
    closed.chmod(0)
    script = "import os, sys; from imvar import batch; os.geteuid() or os.setuid(65534)\nbatch.plan(*sys.argv[1:])"
    tmp_path.chmod(0o777)
    for path in tmp_path.parents:
        if os.geteuid() == 0 and path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755)
    try:
        run = [sys.executable, "-c", script, tmp_path / "photos", tmp_path / "out"]
        result = subprocess.run(run, capture_output=True, text=True)
    finally:
        closed.chmod(0o755)
    assert "photos/closed: expected a folder that can be read, got Permission denied" in result.stderr
    assert os.listdir(tmp_path) == ["photos"]


def test_no_inputs(tmp_path):
    with pytest.raises(InputError, match="inputs: expected at least one, got none"):
        batch.plan([], tmp_path / "out")
    with pytest.raises(TypeError, match="inputs: expected a path or a list of them, got 5"):
        batch.plan(5, tmp_path / "out")


def test_the_output_folder_is_no_input(tmp_path, monkeypatch):
    """In the folder of the photos it is left out, also by patterns; itself it is refused."""
    monkeypatch.chdir(tmp_path)
    photos = save_drawings(tmp_path / "photos", "fox", "panda")
    out = photos / "out"
    for inputs in photos, "photos/**/*.png":
        first = batch.plan(inputs, out, checkpoint="imvar-emoji")
        save_drawings(out / "images" / "0000" / "0000000")
        again = batch.plan(inputs, out, checkpoint="imvar-emoji")
        assert again.parts == first.parts
        assert first.items == 2
        for path in (out, out / "images", out / "images/0000/0000000/fox.png"):
            with pytest.raises(InputError, match="expected an input outside the output folder"):
                batch.extend(out, path)
        (out / "plan").rename(tmp_path / "plan")
        (tmp_path / "plan" / "plan.json").unlink()
        (tmp_path / "plan" / "items-0.jsonl").unlink()
        (tmp_path / "plan").rmdir()


# ---- ids


def test_ids_that_repeat(tmp_path):
    for name in "a", "b":
        save_drawings(tmp_path / name, "fox")
    with pytest.raises(InputError, match=r"a different id for each, got fox.png twice; pass a relative pattern"):
        batch.plan([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


@pytest.mark.parametrize("kind", ["folder", "pattern", "list", "files"])
def test_more_loose_files_than_a_plan_has(kind, tmp_path, monkeypatch):
    """They are refused with what to do; members of archives count only where a list has them as files."""
    monkeypatch.setattr("imvar.batch.inputs.MAX_LOOSE", 2)
    save_drawings(tmp_path / "photos", "fox", "panda", "cake")
    archive = write_tar(tmp_path / "a.tar", {f"{k}.png": b"" for k in range(9)})
    names = sorted((tmp_path / "photos").iterdir())
    given = {
        "folder": tmp_path / "photos",
        "pattern": tmp_path / "photos" / "*.png",
        "list": write_lines(tmp_path / "list.jsonl", *({"image": str(name)} for name in names)),
        "files": [archive, *names],
    }[kind]
    with pytest.raises(InputError, match=r"expected up to 2 files, got more; put the images into .tar or .parquet"):
        batch.plan(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(ids([archive, *names[:2]], tmp_path / "out")) == 11


ODD = [
    *(
        "../../up",
        "/etc/passwd",
        "C:\\windows\\x",
        "..",
        ".",
        "a/../../b",
        "con",
        "-rf",
        "a\nb",
        "a\0b",
        "a\rb",
        " ",
        "~",
    ),
    *(
        "\ud800",
        "\udc80",
        "é",
        "e\u0301",
        "É",
        "a.b.c",
        "a.b",
        "a_b",
        "a/b",
        "A/B",
        "x" * 900,
        "x" * 899 + "y",
        "狐" * 900,
    ),
    *(
        "fox",
        "fox-0",
        "fox-0-0",
        "FOX",
        "fox.png",
        "fox.safetensors",
        ".png",
        "💡" * 30,
        "\u202e",
        "a\u2028b",
        "'\"`$(x)",
    ),
]


@pytest.mark.parametrize("format", ["files", "tar", "parquet"])
def test_ids_of_any_characters(format, tmp_path):
    """They lead to no other folder, and not to one file, not even where case does not distinguish names."""
    save_drawings(tmp_path)
    listed = write_lines(tmp_path / "list.jsonl", *({"id": name, "image": "fox.png"} for name in ODD))
    out = tmp_path / "folder" / "out"
    plan = batch.plan(listed, out, checkpoint="imvar-emoji", n=2, format=format)
    assert [item["id"] for item in plan.shard(0)] == ODD
    rows = make_shards(plan, Stub())
    assert [(row["id"], row["k"]) for row in rows] == [(name, k) for name in ODD for k in range(2)]
    names = [row["file"].rpartition("/")[2] if format == "files" else row["member"] for row in rows]
    assert len({name.casefold() for name in names}) == len(rows) == 2 * len(ODD)
    assert all(name.count(".") == 1 and len(name.encode()) <= 100 for name in names)
    assert os.listdir(tmp_path / "folder") == ["out"]
    assert {*os.listdir(out)} == {"plan", "rows", "done", "images" if format == "files" else "shards"}
    if format == "tar":
        with tarfile.open(out / rows[0]["file"]) as archive:
            found = archive.getnames()
        assert found == [each for name in names for each in (name, name.replace(".png", ".json"))]


# ---- lists

WRONG = {
    "{": "expected an object in JSON, got",
    "[1]": 'expected an object such as {"image": "fox.png"}, got [1]',
    "null": "expected an object such as",
    '{"picture": "a"}': "expected keys among augment, image, init, mask, mix, negative, preprocess, regions, slerp, "
    "strength, got 'picture'",
    '{"id": "a"}': "expected one of image, mix, regions, slerp, got none",
    '{"image": "a", "mix": {"a": 1}}': "expected one of image, mix, regions, slerp, got image, mix",
    '{"image": 5}': " image: expected a path, got 5",
    '{"image": ""}': " image: expected a path that is not empty",
    '{"image": "a\\u0000b"}': " image: expected a path that is not empty and has no NUL character",
    '{"id": "", "image": "a"}': " id: expected a text of up to 1000 characters, got ''",
    '{"id": 5, "image": "a"}': " id: expected a text of up to 1000 characters, got 5",
    '{"mix": {"a": 1}}': " id: expected a text of up to 1000 characters, got None",
    '{"id": "a", "mix": {}}': ' mix: expected weights by file, such as {"fox.png": 0.7, "panda.png": 0.3}, got {}',
    '{"id": "a", "mix": [["a"]]}': " mix: expected weights by file",
    '{"id": "a", "mix": {"a": "much"}}': " mix: expected a finite number, got 'much'",
    '{"id": "a", "mix": {"a": NaN}}': " mix: expected a finite number, got nan",
    '{"id": "a", "mix": {"a": 1e999}}': " mix: expected a finite number, got inf",
    '{"id": "a", "mix": {"a": 1%s}}' % ("0" * 400): " mix: expected a finite number, got 1000",
    '{"id": "a", "slerp": ["a", "b"]}': " slerp: expected two files and a fraction",
    '{"id": "a", "slerp": ["a", "b", 2]}': " slerp: expected a number from 0 to 1, got 2",
    '{"image": "a", "augment": 0.5}': " augment: expected the amount of noise and its seed, such as [0.5, 0], got 0.5",
    '{"image": "a", "augment": [0.5, 0.5]}': " augment: expected an integer from 0 to 9223372036854775807, got 0.5",
    '{"image": "a", "augment": [2, 0]}': " augment: expected a number from 0 to 1, got 2",
    '{"id": "a", "mix": {"a": 1}, "augment": [0.5, 0]}': " augment: expected image with it, got none",
    '{"image": "a", "strength": 0.5}': " strength: expected init with it, got none",
    '{"image": "a", "mask": "m"}': " mask: expected init with it, got none",
    '{"image": "a", "init": "i", "strength": true}': " strength: expected a number from 0 to 1, got True",
    '{"image": "a", "init": "i.safetensors"}': " init: expected an image, got i.safetensors, an embedding",
    '{"image": "a", "preprocess": "best"}': " preprocess: expected one of 'clip', 'card', 'training', got 'best'",
    '{"id": "a", "regions": []}': ' regions: expected a list such as [{"image": "fox.png", "mask": "left.png"}], got',
    '{"id": "a", "regions": [{"mask": "m"}]}': " regions[0]: expected image, and possibly mask and scale, got mask",
    '{"id": "a", "regions": [{"image": "a", "scale": 2}]}': " regions[0].scale: expected a number from 0 to 1, got 2",
    '{"id": "a", "regions": [{"image": "a", "scale": {"mid_block": "x"}}]}': " regions[0].scale.mid_block: expected a "
    "number from 0 to 1, got 'x'",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_lines_are_named(line, tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text(f'{{"image": "fine.png"}}\n\n{line}\n')
    with pytest.raises(InputError) as error:
        batch.plan(path, tmp_path / "out")
    assert str(error.value).startswith(f"{path}:3:")
    assert WRONG[line] in str(error.value)
    assert not (tmp_path / "out").exists()


def test_paths_in_a_list_are_relative_to_it(tmp_path, monkeypatch):
    folder = save_drawings(tmp_path / "lists")
    monkeypatch.chdir(tmp_path)
    path = folder / "list.ndjson"
    path.write_bytes(b'\xef\xbb\xbf{"image": "fox.png"}\n{"id": "b", "image": "/elsewhere/\xff.png"}')
    found = items("lists/list.ndjson", "out")
    assert found == [
        {"id": "fox.png", "image": str(folder / "fox.png")},
        {"id": "b", "image": os.fsdecode(b"/elsewhere/\xff.png")},
    ]


def test_shared_conditions(tmp_path, monkeypatch):
    """Items have their own instead; paths are relative to the working folder, and files exist."""
    monkeypatch.chdir(tmp_path)
    save_drawings(tmp_path, "fox", "cake", "leaf")
    write_lines(tmp_path / "list.jsonl", {"image": "fox.png"}, {"id": "2", "image": "fox.png", "strength": 0.25})
    shared = {"negative": "cake.png", "init": "leaf.png", "strength": 0.5}
    inputs = ["list.jsonl", "leaf.png", write_tar(tmp_path / "a.tar", {"x.png": b""})]
    found = items(inputs, "out", shared=shared)
    absolute = {"negative": str(tmp_path / "cake.png"), "init": str(tmp_path / "leaf.png")}
    assert [{**item, "image": 0, "id": 0} for item in found] == [
        {"id": 0, "image": 0, **absolute, "strength": strength} for strength in (0.5, 0.25, 0.5, 0.5)
    ]
    for wrong, message in {
        "nothing.png": r"negative: expected a file, got .*nothing.png, which does not exist",
        5: "shared: negative: expected a path, got 5",
    }.items():
        with pytest.raises(InputError, match=message):
            batch.plan("leaf.png", "out", shared={"negative": wrong})
    with pytest.raises(InputError, match="shared: expected keys among init, mask, negative, preprocess, strength"):
        batch.plan("leaf.png", "out", shared={"image": "fox.png"})
    with pytest.raises(InputError, match="shared: mask: expected init with it, got none"):
        batch.plan("leaf.png", "out", shared={"mask": "fox.png"})


# ---- archives


def test_tar(tmp_path):
    """Also one in which names repeat in folders, with other files, and with a broken image."""
    members = {
        "0001.png": png("fox"),
        "0001.json": b"{}",
        "a/0001.png": png("cake"),
        "._b.png": b"",
        "c.jpg": png("boat")[:90],
    }
    path = write_tar(tmp_path / "shard.tar", members)
    plan = batch.plan(path, tmp_path / "out", checkpoint="imvar-emoji", n=1)
    assert [item["id"] for item in plan.shard(0)] == ["shard.tar/0001.png", "shard.tar/a/0001.png", "shard.tar/c.jpg"]
    stub = Stub()
    make_shards(plan, stub)
    assert [image.tobytes() for image in stub.calls[0]["image"][:2]] == [drawing(n).tobytes() for n in ("fox", "cake")]
    errors = errors_of(tmp_path / "out")
    assert errors.keys() == {"shard.tar/c.jpg"}
    assert errors["shard.tar/c.jpg"].startswith("'shard.tar/c.jpg': expected a JPEG, PNG")


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_memory_does_not_grow_with_archives(kind, tmp_path):
    """Of each member, 8 bytes are kept while the plan is made, to find ids that repeat."""
    peaks = []
    for members in 1, 2000, 8000:
        names, path = [f"{k:05d}.png" for k in range(members)], tmp_path / f"{members}.{kind}"
        if kind == "tar":
            write_tar(path, dict.fromkeys(names, b""))
        else:
            write_parquet(path, {"key": names, "image": [b""] * members}, row_group_size=1000)
        of_plans = []
        for number in range(3):  # the least of three, as once something else of the process allocates too
            tracemalloc.start()
            batch.plan(path, tmp_path / f"out-{members}-{number}", checkpoint="imvar-emoji")
            of_plans.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        peaks.append(min(of_plans))
    assert peaks[2] - peaks[1] < 6000 * 50


def test_a_tar_that_is_none_or_has_changed(tmp_path):
    path = tmp_path / "shard.tar"
    path.write_bytes(b"\x1f\x8b not a tar file" * 99)
    with pytest.raises(InputError, match=r"shard.tar: expected an uncompressed tar file, got"):
        batch.plan(path, tmp_path / "out")
    plan = batch.plan(write_tar(path, {"a.png": png("fox")}), tmp_path / "out", checkpoint="imvar-emoji")
    path.write_bytes(b"")
    make_shards(plan, Stub())
    assert "a.png" in errors_of(tmp_path / "out")["shard.tar/a.png"]


@pytest.mark.parametrize("kind", ["bytes", "datasets", "paths"])
def test_parquet(kind, tmp_path):
    """Columns of bytes, of dictionaries as datasets writes them, and of paths; rows in several groups."""
    save_drawings(tmp_path)
    values = {
        "bytes": [png("fox"), png("cake"), None, b"broken"],
        "datasets": [
            *({"bytes": png("fox"), "path": None}, {"bytes": None, "path": "cake.png"}),
            *(None, {"bytes": b"broken", "path": "x"}),
        ],
        "paths": ["fox.png", "cake.png", None, "nothing.png"],
    }[kind]
    columns = {"caption": ["a", "b", "c", "d"], "image": values}
    path = write_parquet(tmp_path / "a.parquet", columns, row_group_size=2)
    plan = batch.plan(path, tmp_path / "out", checkpoint="imvar-emoji", n=1)
    assert [item["id"] for item in plan.shard(0)] == [f"a.parquet/{row}" for row in range(4)]
    stub = Stub()
    make_shards(plan, stub)
    assert [image.tobytes() for image in stub.calls[0]["image"][:2]] == [drawing(n).tobytes() for n in ("fox", "cake")]
    errors = errors_of(tmp_path / "out")
    assert errors.keys() == {"a.parquet/2", "a.parquet/3"}
    assert errors["a.parquet/2"] == "a.parquet/2: expected the bytes of an image, got None"


def test_ids_of_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"key": ["x", "y"], "jpg": [b"", b""]})
    assert ids(path, tmp_path / "out") == ["a.parquet/x", "a.parquet/y"]
    path = write_parquet(tmp_path / "a.parquet", {"id": [1, 1], "jpg": [b"", b""]})
    with pytest.raises(InputError, match=r"got a.parquet/1 twice"):
        batch.plan(path, tmp_path / "out")


def test_a_parquet_file_that_is_none_or_has_changed(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"a.parquet: expected a parquet file, got"):
        batch.plan(path, tmp_path / "out")
    with pytest.raises(InputError, match=r"a.parquet: expected a column named image or .*, got caption"):
        batch.plan(write_parquet(path, {"caption": ["a"]}), tmp_path / "out")
    plan = batch.plan(write_parquet(path, {"image": [png("fox")]}), tmp_path / "out", checkpoint="imvar-emoji")
    path.write_bytes(b"no parquet")
    make_shards(plan, Stub())
    assert "a.parquet/0: expected an image in" in errors_of(tmp_path / "out")["a.parquet/0"]


def test_without_pyarrow(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", {"image": [b""]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    message = r"pyarrow, for parquet files, got no such package; pip install 'imvar\[parquet\]'"
    with pytest.raises(InputError, match=message):
        batch.plan(path, tmp_path / "out")
    with pytest.raises(InputError, match=f"format: expected {message}"):
        batch.plan(save_drawings(tmp_path / "photos"), tmp_path / "out", format="parquet")
    assert not (tmp_path / "out").exists()


def test_parquet_of_a_batch_as_the_input_of_another(tmp_path):
    """Each image has an id of its own, also those of one input and those of ids that are no Unicode."""
    save_drawings(tmp_path)
    listed = write_lines(tmp_path / "list.jsonl", *({"id": name, "image": "cake.png"} for name in ("a", "\udc80")))
    plan = batch.plan(listed, tmp_path / "a", checkpoint="imvar-emoji", n=2, shard=1, format="parquet")
    make_shards(plan, Stub())
    again = batch.plan(str(tmp_path / "a/shards/0000/*.parquet"), tmp_path / "b", checkpoint="imvar-emoji", n=1)
    assert [item["id"] for item in again.shard(0)] == [
        *(f"0000000.parquet/a-{k}" for k in range(2)),
        *(f"0000001.parquet/\\udc80-{k}" for k in range(2)),
    ]
    stub = Stub()
    rows = make_shards(again, stub)
    assert [image.tobytes() for image in stub.calls[0]["image"]] == [drawing("fox").tobytes()] * 4
    assert len(rows) == 4
    assert not errors_of(tmp_path / "b")


def test_webdataset_of_a_batch_as_the_input_of_another(tmp_path):
    """A batch's tar files are inputs of the next."""
    plan = batch.plan(save_drawings(tmp_path / "photos"), tmp_path / "a", checkpoint="imvar-emoji", n=2, format="tar")
    make_shards(plan, Stub())
    (path,) = (tmp_path / "a" / "shards").rglob("*.tar")
    assert len(ids(path, tmp_path / "b")) == 2 * len(DRAWINGS)
    with tarfile.open(path) as archive:
        entries = {member.name: archive.extractfile(member).read() for member in archive}
    assert json.loads(entries["fox-1.json"])["k"] == 1
    assert entries["fox-1.png"] == png("fox")
