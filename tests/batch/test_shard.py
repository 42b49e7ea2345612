"""Shards: what the pipeline is called with, and images that depend on nothing but their input, seed and settings."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import imvar
from imvar import Region, batch, cli, load_image
from imvar.batch.journal import path_of
from imvar.batch.shard import run_shard
from imvar.image.load_image import load_image as read
from imvar.records.files import read_record
from tests.support.batches import (
    DRAWINGS,
    FAST,
    Stub,
    errors_of,
    images_of,
    make_shards,
    rows_of,
    save_drawings,
    write_lines,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of drawings, two masks and an embedding."""
    folder = save_drawings(tmp_path_factory.mktemp("photos"))
    for name, box in {"left": (0, 0, 16, 32), "top": (0, 0, 32, 16)}.items():
        mask = Image.new("L", (32, 32))
        mask.paste(255, box)
        mask.save(folder / f"mask-{name}.png")
    imvar.save_image_embeds(folder / "seed.safetensors", torch.randn(1, 1, 24, generator=torch.manual_seed(0)))
    return folder


@pytest.fixture(scope="module")
def pipe(checkpoint):
    torch.set_num_threads(1)
    pipe = imvar.StableDiffusionImageVariationPipeline.from_pretrained(checkpoint)
    pipe.enable_vae_slicing()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plan_of(inputs, out, checkpoint, **settings):
    return batch.plan(inputs, out, checkpoint=checkpoint, **(FAST | settings))


# ---- conditions

ITEMS = {
    "photo": {"image": "fox.png"},
    "photo, negative": {"image": "fox.png", "negative": "cake.png"},
    "photo, training": {"image": "fox.png", "preprocess": "training"},
    "file": {"image": "seed.safetensors"},
    "mix": {"mix": {"fox.png": 0.7, "panda.png": 0.3}},
    "mix of pairs": {"mix": [["fox.png", 2], ["fox.png", -1], ["seed.safetensors", 0.5]]},
    "mix, card, negative": {
        "mix": {"fox.png": 0.7, "panda.png": 0.3},
        "preprocess": "card",
        "negative": "seed.safetensors",
    },
    "slerp": {"slerp": ["fox.png", "panda.png", 0.25]},
    "augment": {"image": "fox.png", "augment": [0.5, 7]},
    "augment of a file": {"image": "seed.safetensors", "augment": [0.5, 7], "negative": "cake.png"},
    "regions": {"regions": [{"image": "fox.png"}, {"image": "panda.png", "mask": "mask-left.png", "scale": 0.5}]},
    "regions by block": {
        "regions": [{"image": "seed.safetensors", "scale": {"down_blocks.0": 1, "up_blocks.1": 0.5}}],
        "negative": "cake.png",
    },
    "init": {"image": "fox.png", "init": "boat.png"},
    "init, strength": {"image": "fox.png", "init": "boat.png", "strength": 0.5, "negative": "cake.png"},
    "init, mask": {"image": "fox.png", "init": "boat.png", "mask": "mask-left.png"},
    "mix, init, mask": {"mix": {"fox.png": 1}, "init": "boat.png", "mask": "mask-top.png", "strength": 0.6},
}


def arguments(name, folder, pipe):
    """Return the arguments that select the conditions of an item, by hand."""

    def photo(name):
        return load_image(folder / f"{name}.png")

    def encode(name, preprocess="clip"):
        return pipe.encode_image(photo(name), preprocess=preprocess)

    saved = imvar.load_image_embeds(folder / "seed.safetensors")
    fox = {"image": photo("fox")}
    mixture = imvar.mix([(encode("fox", "card"), 0.7), (encode("panda", "card"), 0.3)])
    blocks = {"down_blocks.0": 1, "up_blocks.1": 0.5}
    init = {"init_image": photo("boat")}
    return {
        "photo": fox,
        "photo, negative": fox | {"negative_image_embeds": encode("cake")},
        "photo, training": {"image_embeds": encode("fox", "training")},
        "file": {"image_embeds": saved},
        "mix": {"image_embeds": imvar.mix([(encode("fox"), 0.7), (encode("panda"), 0.3)])},
        "mix of pairs": {"image_embeds": imvar.mix([(encode("fox"), 2), (encode("fox"), -1), (saved, 0.5)])},
        "mix, card, negative": {"image_embeds": mixture, "negative_image_embeds": saved},
        "slerp": {"image_embeds": imvar.slerp(encode("fox"), encode("panda"), 0.25)},
        "augment": {"image_embeds": imvar.augment(encode("fox"), 0.5, seed=7)},
        "augment of a file": {
            "image_embeds": imvar.augment(saved, 0.5, seed=7),
            "negative_image_embeds": encode("cake"),
        },
        "regions": {
            "image_embeds": [Region(encode("fox")), Region(encode("panda"), photo("mask-left"), 0.5)],
        },
        "regions by block": {
            "image_embeds": [Region(saved, scale=blocks)],
            "negative_image_embeds": encode("cake"),
        },
        "init": fox | init,
        "init, strength": fox | init | {"strength": 0.5, "negative_image_embeds": encode("cake")},
        "init, mask": fox | init | {"mask_image": photo("mask-left"), "paste": True},
        "mix, init, mask": {"image_embeds": encode("fox"), "mask_image": photo("mask-top"), "paste": True}
        | init
        | {"strength": 0.6},
    }[name]


@pytest.fixture(scope="module", params=[(2, 4), (2, 1)], ids=["rows of several items", "rows of one item"])
def made(request, photos, checkpoint, pipe, tmp_path_factory):
    """A batch of all kinds of items: settings and output folder."""
    n, rows = request.param
    listed = write_lines(photos / f"list-{n}-{rows}.jsonl", *({"id": name, **item} for name, item in ITEMS.items()))
    out = tmp_path_factory.mktemp("made") / "out"
    plan = plan_of(listed, out, checkpoint, n=n, batch=rows)
    make_shards(plan)
    assert errors_of(out) == {}
    return plan.settings, out


@pytest.mark.parametrize("name", ITEMS)
def test_images_are_those_of_the_pipeline(name, made, photos, pipe):
    """With the same number of rows in a call."""
    settings, out = made
    rows = {row["k"]: row for row in rows_of(out) if row["id"] == name}
    for k in range(settings.n):
        given = arguments(name, photos, pipe)
        is_alone = settings.batch == 1 or "init_image" in given or isinstance(given.get("image_embeds"), list)
        if is_alone:
            more = {"num_images_per_prompt": settings.batch}
        else:
            more = {}
            for key in {"image", "image_embeds", "negative_image_embeds"} & given.keys():
                value = given[key]
                given[key] = value.expand(settings.batch, -1, -1) if key != "image" else [value] * settings.batch
        seed = settings.seed_of(name, k)
        expected = pipe(
            **given, **more, seed=[seed] * settings.batch, num_inference_steps=2, guidance_scale=settings.guidance
        )
        assert (rows[k]["seed"], rows[k]["flagged"]) == (seed, expected.nsfw_content_detected[0])
        assert read(out / rows[k]["file"]).tobytes() == expected.images[0].tobytes()


@pytest.mark.parametrize("name", [name for name in ITEMS if "regions" not in name and name != "mix of pairs"])
def test_images_are_made_again_from_their_records(name, made, photos, checkpoint, tmp_path, capsys):
    settings, out = made
    for row in (row for row in rows_of(out) if row["id"] == name):
        item, record = ITEMS[name], read_record(out / row["file"])
        assert record["exact"]
        assert record["call"]["rows"] == settings.batch
        main = [item["image"]] if "image" in item else [*item.get("mix", item.get("slerp"))][:2]
        args = [arg for file in main for arg in ("--photo", photos / file)]
        args += [arg for key in ("negative", "init", "mask") if key in item for arg in (f"--{key}", photos / item[key])]
        status = cli.main(
            ["again", str(out / row["file"]), *map(str, args), "--checkpoint", str(checkpoint), "-o", str(tmp_path)]
        )
        printed = capsys.readouterr()
        assert (status, printed.err) == (0, "")
        assert "equal in every pixel" in printed.out


# ---- equal bytes


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_bytes_do_not_depend_on_other_inputs_and_shards(n, rows, photos, checkpoint, pipe, tmp_path):
    """The same images beside others, beside broken ones, and in shards of other sizes: every byte of every file."""
    listed = [{"image": f"{name}.png"} for name in DRAWINGS]
    listed += [{"id": "m", **ITEMS["mix"]}, {"id": "i", **ITEMS["init"], "strength": 1}, {"id": "s", **ITEMS["file"]}]
    first = write_lines(photos / "all.jsonl", *listed)
    settings = {"n": n, "batch": rows, "steps": 1, "height": 64, "width": 64}
    make_shards(plan_of(first, tmp_path / "a", checkpoint, **settings, shard=256), pipe)
    expected = images_of(tmp_path / "a")
    assert len(expected) == n * len(listed)
    for shard in 3, 4:
        make_shards(plan_of(first, tmp_path / f"{shard}", checkpoint, **settings, shard=shard), pipe)
        assert images_of(tmp_path / f"{shard}") == expected
    (photos / "broken.png").write_bytes((photos / "fox.png").read_bytes()[:90])
    broken = [
        {"id": f"b{i}", "image": name} for i, name in enumerate(("broken.png", "nothing.png", "list.safetensors"))
    ]
    some = [broken[0], *listed[1:3], broken[1], *listed[4:6], broken[2], {"id": "new", "image": "leaf.png"}, listed[7]]
    write_lines(photos / "some.jsonl", *some)
    make_shards(plan_of(photos / "some.jsonl", tmp_path / "b", checkpoint, **settings, shard=5), pipe)
    found = images_of(tmp_path / "b")
    kept = {"panda.png", "cake.png", "leaf.png", "m", "s"}
    assert {key: data for key, data in found.items() if key[0] in kept} == {
        key: data for key, data in expected.items() if key[0] in kept
    }
    assert errors_of(tmp_path / "b").keys() == {"b0", "b1", "b2"}


def test_bytes_do_not_depend_on_the_number_of_workers(photos, checkpoint, tmp_path):
    folder = save_drawings(tmp_path / "photos")
    for jobs in 1, 2:
        report = batch.run(folder, tmp_path / f"{jobs}", checkpoint, jobs=jobs, **FAST, n=3, shard=2)
        assert (report.made, report.errors, report.done, report.shards) == (15, 0, 3, 3)
    assert images_of(tmp_path / "1") == images_of(tmp_path / "2")
    plan = plan_of(folder, tmp_path / "alone", checkpoint, n=3, shard=2)
    make_shards(plan)
    assert images_of(tmp_path / "alone") == images_of(tmp_path / "1")


def test_tar_has_the_bytes_of_the_files(photos, checkpoint, pipe, tmp_path):
    import tarfile

    inputs, settings = [photos / "fox.png", photos / "cake.png"], {"n": 2, "batch": 3}
    make_shards(plan_of(inputs, tmp_path / "files", checkpoint, **settings), pipe)
    for name in "a", "b":
        make_shards(plan_of(inputs, tmp_path / name, checkpoint, **settings, format="tar"), pipe)
    path = tmp_path / "a" / "shards" / "0000" / "0000000.tar"
    assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    files = {path.name: path.read_bytes() for path in (tmp_path / "files" / "images").rglob("*.png")}
    with tarfile.open(path) as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}
    assert {name: data for name, data in members.items() if name.endswith(".png")} == files


def test_parquet_has_the_bytes_of_the_files(photos, checkpoint, pipe, tmp_path):
    """In the columns and the metadata by which datasets shows images; more of them than one row group."""
    import pyarrow.parquet

    inputs, settings = [photos / "fox.png", photos / "cake.png"], {"n": 51, "batch": 51, "shard": 3}
    settings |= {"steps": 1, "on_flagged": "keep"}
    (tmp_path / "broken.png").write_text("")
    inputs.append(tmp_path / "broken.png")
    rows = make_shards(plan_of(inputs, tmp_path / "files", checkpoint, **settings), pipe)
    for name in "a", "b":
        make_shards(plan_of(inputs, tmp_path / name, checkpoint, **settings, format="parquet"), pipe)
    path = tmp_path / "a" / "shards" / "0000" / "0000000.parquet"
    assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    file = pyarrow.parquet.ParquetFile(path)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [100, 2]
    features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert features == {"image": {"_type": "Image"}}
    found = file.read().to_pylist()
    assert [*found[0]] == ["id", "k", "seed", "image", "sha256", "flagged", "bad_concepts"]
    assert found == [
        {key: row[key] for key in ("id", "k", "seed", "sha256", "flagged", "bad_concepts")}
        | {"image": {"bytes": data.read_bytes(), "path": data.name}}
        for row in rows
        if "file" in row and (data := tmp_path / "files" / row["file"])
    ]


def test_same_seeds(photos, checkpoint, pipe, tmp_path):
    rows = make_shards(
        plan_of([photos / "fox.png", photos / "cake.png"], tmp_path / "a", checkpoint, n=2, seeds="same", seed=5), pipe
    )
    assert [row["seed"] for row in rows] == [5, 6, 5, 6]


@pytest.mark.parametrize("save", ["webp", "jpeg"])
def test_other_formats_of_images(save, photos, checkpoint, pipe, tmp_path):
    (row,) = make_shards(plan_of(photos / "fox.png", tmp_path / "a", checkpoint, n=1, save=save), pipe)
    assert row["file"].endswith(f"fox-0.{save}")
    assert read_record(tmp_path / "a" / row["file"])["seed"] == row["seed"]


def test_no_metadata(photos, checkpoint, pipe, tmp_path):
    (row,) = make_shards(plan_of(photos / "fox.png", tmp_path / "a", checkpoint, n=1, metadata=False), pipe)
    assert Image.open(tmp_path / "a" / row["file"]).info == {}


# ---- the calls


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_each_call_has_exactly_batch_rows(n, rows, photos, tmp_path):
    listed = write_lines(photos / "calls.jsonl", *({"id": name, **item} for name, item in ITEMS.items()))
    plan = plan_of(listed, tmp_path / "out", "imvar-emoji", n=n, batch=rows, shard=7)
    stub = Stub()
    made = make_shards(plan, stub)
    assert len(made) == n * len(ITEMS)
    for call in stub.calls:
        assert len(call["seed"]) == rows
        images = call.get("image", call.get("image_embeds"))
        per_image = call.get("num_images_per_prompt", 1)
        assert rows == (per_image if isinstance(images[0], Region) else len(images) * per_image)
        assert call["num_inference_steps"] == 2
    seeds = [seed for call in stub.calls for seed in call["seed"] if seed]
    assert sorted(seeds) == sorted(row["seed"] for row in made)


def test_an_embedding_of_another_width_is_an_error_of_its_own(photos, checkpoint, pipe, tmp_path):
    imvar.save_image_embeds(tmp_path / "wide.safetensors", torch.ones(1, 1, 25))
    imvar.save_image_embeds(tmp_path / "two.safetensors", torch.ones(2, 1, 24))
    imvar.save_image_embeds(tmp_path / "huge.safetensors", torch.full((1, 1, 24), 1e38))
    shutil.copy(photos / "seed.safetensors", tmp_path)
    make_shards(plan_of(str(tmp_path / "*.safetensors"), tmp_path / "out", checkpoint, n=1), pipe)
    errors = errors_of(tmp_path / "out")
    assert images_of(tmp_path / "out").keys() == {("seed.safetensors", 0)}
    assert "24" in errors["wide.safetensors"]
    assert "expected one embedding (1, 1, c), got a tensor of shape (2, 1, 24)" in errors["two.safetensors"]
    assert "finite" in errors["huge.safetensors"]


def test_an_item_that_the_pipeline_refuses_is_an_error_of_its_own(photos, checkpoint, pipe, tmp_path):
    """And no death of a process in the journal of the others."""
    listed = write_lines(
        photos / "refused.jsonl", {"image": "fox.png"}, {"id": "x", "image": "fox.png", "negative": "cake.png"}
    )
    plan = plan_of(listed, tmp_path / "out", checkpoint, n=1, guidance=1)
    make_shards(plan, pipe)
    assert errors_of(tmp_path / "out").keys() == {"x"}
    assert images_of(tmp_path / "out").keys() == {("fox.png", 0)}


# ---- out of memory


class Full(Stub):
    def __call__(self, **arguments):
        super().__call__(**arguments)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def test_out_of_memory_says_what_needs_less(photos, tmp_path):
    """It never takes fewer rows by itself, and counts as no death of the items."""
    plan = plan_of(photos / "fox.png", tmp_path / "out", "imvar-emoji")
    stub = Full()
    for _ in range(5):
        with pytest.raises(
            imvar.OutOfMemoryError, match=r"enough for calls of 4 rows, got CUDA out .*; use a smaller --batch"
        ):
            run_shard(tmp_path / "out", plan, 0, stub)
    assert [len(call["seed"]) for call in stub.calls] == [4] * 5
    assert '"stop"' in path_of(tmp_path / "out", 0).read_text()
    assert [row["k"] for row in make_shards(plan, Stub())] == [0, 1, 2, 3]


def test_out_of_memory_of_a_worker(photos, checkpoint, tmp_path):
    """The host lacks memory for an image of 2 ** 32 pixels."""
    resource = pytest.importorskip("resource")
    plan_of(photos / "fox.png", tmp_path / "out", checkpoint, height=65528, width=65528)
    process = subprocess.run(
        [sys.executable, "-m", "imvar", "batch", "retry", tmp_path / "out"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (5 * 2**29, 5 * 2**29)),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 71
    assert "enough for calls of 4 rows, got " in process.stderr
    assert "use a smaller --batch, in another output folder" in process.stderr
    assert "got a lack of memory" in process.stderr
    assert rows_of(tmp_path / "out") == []
