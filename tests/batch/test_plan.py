"""The plan of a batch: the same command returns it, another one is refused, and what is added leaves markers valid."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from imvar import InputError, batch
from imvar.batch.store import Store
from imvar.batch.worker import work
from tests.support.batches import FAST, Stub, images_of, make_shards, save_drawings, write_lines

OTHER = {
    **{"revision": "v2", "scheduler": "ddim", "dtype": "bfloat16", "device": "cpu", "threads": 2, "n": 3, "seed": 1},
    **{"seeds": "same", "steps": 3, "guidance": 1.5, "height": 64, "width": 72, "on_flagged": "keep", "batch": 2},
    **{"shard": 3, "format": "tar", "save": "webp", "metadata": False, "checkpoint": "someone/other"},
}


@pytest.fixture
def photos(tmp_path):
    return save_drawings(tmp_path / "photos")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def make(photos, out, **settings):
    return batch.plan(photos, out, **{"checkpoint": "imvar-emoji", **settings})


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the same command and others


def test_the_same_command_returns_the_plan(photos, out, monkeypatch):
    first = make(photos, out)
    before = files(out)
    monkeypatch.chdir(photos.parent)
    assert make("photos", "out", n=np.int64(4), guidance=3).parts == first.parts
    assert files(out) == before
    assert len(first) == 1
    assert first.items == 5
    assert batch.open_plan("out").settings == first.settings


def test_a_checkpoint_that_does_not_exist_is_refused(photos, out):
    with pytest.raises(InputError, match="checkpoint: expected a file, a folder, a hub id or imvar-emoji, got 'none'"):
        make(photos, out, checkpoint="none")
    assert not out.exists()


@pytest.mark.parametrize("name", [field.name for field in fields(batch.Settings)])
def test_another_setting_is_refused_by_name(name, photos, out):
    settings = make(photos, out).settings
    before = files(out)
    got = re.escape(f"{name}: {getattr(settings, name)} and {OTHER[name]}")
    message = rf"out: expected the batch of this command, got another .*\b{got}.*; use another -o FOLDER"
    with pytest.raises(InputError, match=message):
        make(photos, out, **{name: OTHER[name]})
    assert files(out) == before


def test_other_inputs_are_refused(photos, out):
    make(photos, out)
    (photos / "fox.png").unlink()
    with pytest.raises(InputError, match=r"a batch of these 4 inputs, got one of 5 inputs.*; imvar batch extend"):
        make(photos, out)
    with pytest.raises(InputError, match=r"of these 5 inputs, got one of 5 inputs, or of other ones"):
        make([photos, write_lines(photos / "list.jsonl", {"id": "new", "image": "fox.png"})], out)


def test_an_output_folder_that_is_a_file(photos, out):
    out.write_bytes(b"")
    for path in out, out / "below":
        with pytest.raises(InputError, match="expected a folder that can be written to"):
            make(photos, path)


def test_two_processes_plan_at_once(photos, out):
    """One plan results, and both have it."""
    script = "import sys; from imvar import batch; print(batch.plan(*sys.argv[1:], checkpoint='imvar-emoji').digest(0))"
    command = [sys.executable, "-c", script, photos, out]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    digests = {run.communicate()[0] for run in runs}
    assert digests == {make(photos, out).digest(0) + "\n"}
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert files(out).keys() == {"plan/plan.json", "plan/items-0.jsonl"}


def test_a_plan_that_was_killed_leaves_nothing(photos, out):
    leftover = out / f".plan.tmp-{'0' * 16}"
    leftover.mkdir(parents=True)
    (leftover / "items-0.jsonl").write_text("{}\n")
    make(photos, out)
    assert files(out).keys() == {"plan/plan.json", "plan/items-0.jsonl"}


# ---- broken plans


def test_a_folder_without_a_plan(tmp_path):
    for call in (batch.open_plan, batch.drive, lambda out: batch.extend(out, "x")):
        with pytest.raises(InputError, match="output folder of imvar batch run, got a folder without a plan"):
            call(tmp_path)


EMPTY = '{"format": 1, "parts": [], "settings": '


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", '{"format": 1}', '{"format": 1, "parts": [{"x": 1}]}'),
        *(EMPTY + '{"x": 1}}', EMPTY + '{"n": "4"}}'),
    ],
)
def test_a_broken_plan(text, photos, out):
    (make(photos, out).folder / "plan.json").write_text(text)
    with pytest.raises(InputError, match=r"plan.json: expected the plan of a batch, got"):
        batch.open_plan(out)


def test_a_plan_of_another_format(photos, out):
    path = make(photos, out).folder / "plan.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError, match=r"plan.json: expected format 1, got 2; use the imvar that made it"):
        batch.open_plan(out)


@pytest.mark.parametrize("change", [str.upper, lambda text: text[:-9], lambda text: 2 * text, lambda text: "", None])
def test_changed_items(change, photos, out):
    path = make(photos, out).folder / "items-0.jsonl"
    text = path.read_text()
    path.unlink()
    if change:
        path.write_text(change(text))
    with pytest.raises(InputError, match=r"items-0.jsonl: expected the 5 inputs of the plan, got (a file|none)"):
        batch.open_plan(out).shard(0)


def test_a_number_that_is_none_of_the_shards(photos, out):
    for number in 1, -1:
        with pytest.raises(InputError, match=f"shard: expected a number from 0 to 0, got {number}"):
            make(photos, out).shard(number)


# ---- more inputs


def test_extend(photos, out, tmp_path, checkpoint):
    """Markers stay valid; the same inputs again change nothing, and ids that repeat are refused."""
    settings = FAST | {"checkpoint": checkpoint, "shard": 2, "n": 1}
    pipe = batch.pipeline_of(make(photos, out, **settings))
    make_shards(batch.open_plan(out), pipe)
    before = {name: data for name, data in files(out).items() if not name.startswith("plan/plan.json")}
    save_drawings(tmp_path / "more", "fox").joinpath("fox.png").rename(tmp_path / "more" / "fox2.png")
    for _ in range(2):
        plan = batch.extend(out, tmp_path / "more")
        assert [len(plan.shard(number)) for number in range(len(plan))] == [2, 2, 1, 1]
    store = Store(out)
    assert [store.marker(i).plan == plan.digest(i) for i in range(3)] == [True] * 3
    assert before.items() <= files(out).items()
    with pytest.raises(InputError, match=r"inputs: expected a different id for each, got fox.png twice"):
        batch.extend(out, photos / "fox.png")
    assert make(photos, out, **settings).parts == plan.parts
    assert len(files(out / "plan")) == len(os.listdir(out / "plan")) == 4
    make_shards(plan, pipe)
    assert images_of(out).keys() == {(f"{name}.png", 0) for name in ("fox", "fox2", "panda", "cake", "boat", "leaf")}


def test_extend_while_a_worker_works(photos, out, tmp_path):
    """It makes the new inputs, too, so that its manifest is that of the whole plan."""
    save_drawings(tmp_path / "more", "fox")
    write_lines(tmp_path / "more.jsonl", {"id": "new", "image": "more/fox.png"})

    def load(plan):
        batch.extend(out, tmp_path / "more.jsonl")
        return Stub()

    assert work(make(photos, out, n=1).folder.parent, load=load)
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["boat.png", "cake.png", "fox.png", "leaf.png", "panda.png", "new"]


def test_input_that_was_removed_after_the_plan(photos, out, checkpoint):
    plan = make(photos, out, checkpoint=checkpoint, n=1, **FAST)
    (photos / "fox.png").unlink()
    rows = make_shards(plan)
    assert [row["error"] for row in rows if "error" in row] == [
        f"{photos / 'fox.png'}: expected {expected_formats()} file, got no such file"
    ]
    assert len(rows) == 5


def expected_formats():
    from imvar.image.load_image import FORMATS, check_formats

    names = check_formats(FORMATS)
    return f"a {', '.join(names[:-1])} or {names[-1]}"


# ---- settings

WRONG = {
    ("n", "4"): "n: expected an integer from 1 to 1000000, got '4'",
    ("n", None): "n: expected an integer from 1 to 1000000, got None",
    ("n", 0): "n: expected an integer from 1 to 1000000, got 0",
    ("n", True): "n: expected an integer from 1 to 1000000, got True",
    ("batch", 5000): "batch: expected an integer from 1 to 4096, got 5000",
    ("shard", 1.5): "shard: expected an integer from 1 to 1000000, got 1.5",
    ("steps", 0): "steps: expected an integer from 1 to 1000000, got 0",
    ("threads", -1): "threads: expected an integer from 1 to 1024, got -1",
    ("seed", 2**63 - 1): "seed: expected an integer from 0 to 9223372036854775804, got 9223372036854775807",
    ("seed", "0"): "seed: expected an integer from 0 to 9223372036854775804, got '0'",
    ("guidance", math.nan): "guidance: expected a finite number from 0, got nan",
    ("guidance", "3"): "guidance: expected a finite number from 0, got '3'",
    ("height", 13): "height: expected a multiple of 8, got 13",
    ("width", "64"): "width: expected an integer from 1 to 65536, got '64'",
    ("scheduler", "best"): "scheduler: expected one of 'ddim'",
    ("dtype", None): "dtype: expected one of 'auto', 'float32', 'bfloat16', 'float16', got None",
    ("device", None): "device: expected a string, got None",
    ("revision", 2): "revision: expected a string, got 2",
    ("checkpoint", 5): "checkpoint: expected a path, got 5",
    ("checkpoint", ""): "checkpoint: expected a path that is not empty",
    ("seeds", ("own",)): "seeds: expected one of 'own', 'same', got ('own',)",
    ("on_flagged", "raise"): "on_flagged: expected one of 'black', 'blur', 'keep', got 'raise'",
    ("format", "zip"): "format: expected one of 'files', 'tar', 'parquet', got 'zip'",
    ("save", "jpg"): "save: expected one of 'png', 'webp', 'jpeg', got 'jpg'",
    ("metadata", "no"): "metadata: expected True or False, got 'no'",
    ("size", 64): "size: expected an option of a batch, got size=64",
}


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_wrong_settings(name, value, photos, out):
    """They are refused before anything is written or loaded."""
    with pytest.raises(InputError) as error:
        make(photos, out, **{name: value})
    assert str(error.value).startswith(WRONG[name, value])
    assert not out.exists()


def test_settings_do_not_depend_on_the_working_folder(photos, out, checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    assert make(photos, out, checkpoint=Path(checkpoint.name)).settings.checkpoint == str(checkpoint)


def test_defaults_of_the_bundled_checkpoint(photos, out):
    settings = make(photos, out).settings
    assert (settings.steps, settings.dtype, settings.threads) == (20, "float32", 1)
    settings = make(photos, out.with_name("b"), checkpoint="lambdalabs/sd-image-variations-diffusers").settings
    assert (settings.steps, settings.dtype, settings.threads) == (50, "auto", None)


# ---- seeds


def test_seeds(photos, out):
    own, same = make(photos, out, seed=7).settings, make(photos, out.with_name("b"), seeds="same", seed=7).settings
    assert [same.seed_of("fox.png", k) for k in range(3)] == [7, 8, 9]
    assert own.seed_of("fox.png", 0) == 2133597156012492111  # the rule: it must not change
    seeds = {own.seed_of(name, k) for name in ("fox.png", "cake.png", "\ud800", "0\nfox.png") for k in range(100)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_plan_of_many(tmp_path):
    lines = (json.dumps({"image": f"{number:05}.png"}) for number in range(20_000))
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    plan = make(tmp_path / "list.jsonl", tmp_path / "out")
    assert [item["id"] for number in range(len(plan)) for item in plan.shard(number)] == [
        f"{number:05}.png" for number in range(20_000)
    ]
