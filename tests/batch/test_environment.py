"""The environment of a batch: images are made where they are equal to those of the other workers, or not at all."""

import json
import re
import shutil

import pyarrow
import pytest
import torch

from imvar import CheckpointError, InputError, StableDiffusionImageVariationPipeline, batch
from imvar.batch.environment import check_environment
from imvar.records.files import read_record
from tests.support.batches import FAST, images_of, make_shards, save_drawings
from tests.support.random_checkpoint import tiny_pipeline


@pytest.fixture
def photos(tmp_path):
    return save_drawings(tmp_path / "photos", "fox", "panda")


def make(photos, checkpoint, name="out", **settings):
    return batch.plan(photos, photos.parent / name, checkpoint=checkpoint, **(FAST | {"n": 1} | settings))


def edit(plan, section, **entries):
    path = plan.folder / "environment.json"
    record = json.loads(path.read_text())
    record[section] |= entries
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("section", "entries", "named"),
    [
        ("versions", {"torch": "1.13"}, "versions.torch: 1.13 and "),
        ("versions", {"imvar": "0.0"}, "versions.imvar: 0.0 and "),
        ("machine", {"threads": 3}, "machine.threads: 3 and 1"),
        ("machine", {"device": "cuda"}, "machine.device: cuda and cpu"),
        ("machine", {"device_name": "Z80"}, "machine.device_name: Z80 and "),
        ("machine", {"dtype": {"unet": "bfloat16"}}, "machine.dtype.unet: bfloat16 and float32"),
        ("machine", {"flags": {"mkldnn": False}}, "machine.flags.mkldnn: False and True"),
        ("scheduler", {"class": "DDIMScheduler"}, "scheduler.class: DDIMScheduler and PNDMScheduler"),
        ("pipeline", {"freeu": 1}, "pipeline.freeu: 1 and none"),
        ("settings", {"guidance_scale": 4}, "guidance_scale: 4 and 3.0"),
    ],
)
def test_another_environment_is_refused_by_name(section, entries, named, photos, checkpoint):
    plan = make(photos, checkpoint)
    batch.pipeline_of(plan)
    edit(plan, section, **entries)
    message = "out: expected the versions, device and weights of the batch, got others (of the batch and here): "
    with pytest.raises(InputError, match=re.escape(message) + f".*{re.escape(named)}.*; images would not be equal"):
        batch.pipeline_of(plan)


def test_another_pyarrow_is_refused_with_parquet_alone(photos, checkpoint):
    """Other formats do not depend on it."""
    plan = make(photos, checkpoint, "parquet", format="parquet")
    batch.pipeline_of(plan)
    edit(plan, "versions", pyarrow="1.0")
    with pytest.raises(InputError, match=rf"versions.pyarrow: 1.0 and {pyarrow.__version__}"):
        batch.pipeline_of(plan)
    plan = make(photos, checkpoint)
    batch.pipeline_of(plan)
    assert "pyarrow" not in (plan.folder / "environment.json").read_text()


def test_other_weights_of_the_same_path_are_refused(photos, folder):
    plan = make(photos, folder)
    make_shards(plan)
    shutil.rmtree(folder)
    tiny_pipeline(seed=1).save_pretrained(folder)
    with pytest.raises(InputError, match=r"got others .*: checkpoint.weights: sha256:\w+ and sha256:\w+; images would"):
        batch.pipeline_of(plan)


def test_a_checkpoint_that_was_moved(photos, folder):
    plan = make(photos, folder)
    moved = folder.rename(folder.with_name("moved"))
    with pytest.raises(InputError, match=re.escape(f"checkpoint: {folder} and {moved}")):
        make(photos, moved)
    with pytest.raises(CheckpointError, match=re.escape(str(folder))):
        batch.pipeline_of(plan)
    with pytest.raises(batch.BatchError) as error:  # at once: another start would not help
        batch.drive(plan.folder.parent)
    assert error.value.status == 2


def test_threads_dtype_and_device_are_those_of_the_first_worker(photos, checkpoint):
    plan = make(photos, checkpoint, threads=None, dtype="auto", device="auto")
    plan_of_bfloat16 = make(photos, checkpoint, "b", threads=2, dtype="bfloat16")
    try:
        assert batch.pipeline_of(plan_of_bfloat16).dtype == torch.bfloat16
        assert torch.get_num_threads() == 2
        shutil.copy(plan_of_bfloat16.folder / "environment.json", plan.folder)
        torch.set_num_threads(1)
        assert batch.pipeline_of(plan).dtype == torch.bfloat16
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"versions": {}, "checkpoint": {}, "machine": {}}'])
def test_a_broken_environment(text, photos, checkpoint):
    plan = make(photos, checkpoint)
    (plan.folder / "environment.json").write_text(text)
    with pytest.raises(InputError, match=r"environment.json: expected "):
        batch.pipeline_of(plan)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 5000}, "num_inference_steps: expected"),
        ({"revision": "v2"}, "revision: expected none for the local checkpoint"),
        ({"device": "tpu"}, "device: expected 'auto', 'cpu' or another device"),
        ({"dtype": "float16"}, "dtype: expected float32 on a CPU"),
    ],
)
def test_settings_that_the_checkpoint_or_the_machine_does_not_have(settings, message, photos, checkpoint):
    with pytest.raises(InputError, match=message):
        batch.pipeline_of(make(photos, checkpoint, **settings))


def test_a_pipeline_that_cannot_be_recorded(photos, checkpoint):
    plan = make(photos, checkpoint)
    pipe = StableDiffusionImageVariationPipeline.from_pretrained(checkpoint)
    with torch.no_grad():
        pipe.unet.conv_in.weight += 1
    with pytest.raises(InputError, match="one whose images can be made again, got unet: its weights"):
        check_environment(plan, pipe)


def test_the_environment_is_that_of_the_records(photos, checkpoint):
    """No setting of the pipeline differs between what is compared and what makes the images."""
    plan = make(photos, checkpoint, metadata=True)
    make_shards(plan)
    environment = json.loads((plan.folder / "environment.json").read_text())
    for row in images_of(plan.folder.parent):
        (path,) = (plan.folder.parent / "images").rglob(f"{row[0].partition('.')[0]}-0.png")
        assert environment.items() <= read_record(path).items()
