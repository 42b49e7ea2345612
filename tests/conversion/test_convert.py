"""Conversion: every tensor where the published lists say, to the bit, there and back, from any folder or file."""

from __future__ import annotations

import json
import os
import shutil
from functools import cache

import pytest
import torch
from fork import GatedUNet
from safetensors.torch import load_file, save_file

import imvar
from imvar import CheckpointError
from imvar.conversion import convert
from imvar.weights.infer_config import infer_config
from imvar.weights.keymap import Dialect, Keymap, Naming
from imvar.weights.single_file import EMA, ORIGINAL_NAMINGS, RAW, PartTensors, SingleFile
from tests.support.expected_tensors import agree, bytes_in, listed, settings, stored
from tests.support.original_checkpoint import LAYOUTS, original, original_keys, write
from tests.support.published_checkpoint import FILES, PUBLISHED
from tests.support.random_checkpoint import TINY_UNET, randomize, tiny_pipeline
from tests.support.tiny_sizes import SETTINGS

MODELS = {
    "unet": imvar.UNet2DConditionModel,
    "vae": imvar.AutoencoderKL,
    "image_encoder": imvar.CLIPVisionModelWithProjection,
    "safety_checker": imvar.StableDiffusionSafetyChecker,
}
AVERAGED = {"full": True, "ema_only": True, "late": True, "v2": False}  # which have averaged weights
SPELLINGS = ("full", "v2")  # these hold every name that there is, and every dtype


# The table beside the lists, at full size


@cache
def full_size(part: str) -> torch.nn.Module:
    with torch.device("meta"):
        return MODELS[part](MODELS[part].read_config(PUBLISHED / "v2.0" / part / "config.json"))


@cache
def meta(layout: str) -> SingleFile:
    """The file of a layout at full size, without values."""
    return SingleFile(PUBLISHED, {row.name: torch.empty(row.shape, device="meta") for row in original_keys(layout)})


@pytest.mark.parametrize("layout", SPELLINGS)
def test_every_row_of_the_lists_finds_its_place(layout):
    rows = {row.name: row for row in original_keys(layout)}
    found = {}
    for part, namings in ORIGINAL_NAMINGS.items():
        model = full_size(part)
        keymap, ours = model.keymap, model.state_dict()
        for naming in namings:
            theirs = keymap.to_theirs(ours, naming)
            if not theirs.keys() & rows.keys():
                continue
            assert {name: list(tensor.shape) for name, tensor in theirs.items()} == {
                name: rows[name].shape for name in theirs
            }
            mine = {name: tensor for name, tensor in meta(layout).tensors.items() if name.startswith(naming.prefix)}
            taken = keymap.to_ours(mine, ours, naming)
            assert {name: tensor.shape for name, tensor in taken.items()} == {
                name: tensor.shape for name, tensor in ours.items()
            }
            for name in ours:
                (source,) = keymap.sources(name, naming)
                found.setdefault(source.name, {})[source.form.index] = f"{part}/{keymap.spelled(name)}"
    assert {name: [targets[i] for i in sorted(targets)] for name, targets in found.items()} == {
        name: row.targets for name, row in rows.items() if row.targets
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_lists_drop_is_dropped_and_nothing_else(layout):
    file = meta(layout)
    keymaps: dict[Naming, Keymap] = {
        naming: model.keymap
        for part, namings in ORIGINAL_NAMINGS.items()
        for model in [full_size(part)]
        for naming in namings
    }
    dropped = {
        name
        for ways in file.parts.values()
        for held in ways
        for name in held.tensors
        if keymaps[held.naming].drops(name, held.naming)
    }
    dropped |= {name for name in file.tensors if file.is_droppable(name)}
    assert dropped == {row.name for row in original_keys(layout) if row.op == "drop"}
    file.check_complete()


def in_dialect(part, dialect):
    """A part at full size, without values, as one file or folder holds it."""
    model = full_size(part)
    return PartTensors(part, Naming(dialect), model.keymap.to_theirs(model.state_dict(), Naming(dialect)), PUBLISHED)


@pytest.mark.parametrize("layout", [*SPELLINGS, Dialect.OURS, Dialect.PUBLISHED, Dialect.ORIGINAL])
def test_settings_told_by_tensors_are_the_published_ones(layout):
    """All that a network is made of, each of which would go unnoticed if it were wrong."""
    if isinstance(layout, Dialect):
        parts = MODELS.keys() if layout is not Dialect.ORIGINAL else ORIGINAL_NAMINGS.keys()
        helds = [in_dialect(part, layout) for part in parts]
    else:
        helds = [held for ways in meta(layout).parts.values() for held in ways]
    for held in helds:
        told = settings(MODELS[held.part].validate_config(infer_config(held), PUBLISHED))
        true = settings(MODELS[held.part].read_config(PUBLISHED / "v2.0" / held.part / "config.json"))
        odd = {name for name in told if told[name] != true[name]}
        assert odd <= {"text_config"}, held.part


def test_heads_are_not_guessed_where_they_cannot_be_told(tmp_path):
    """OpenCLIP's ViT-H has 16 heads of 80 channels, and another activation."""
    wide = {
        name: torch.zeros([1280 if size == 1024 else size for size in tensor.shape], device="meta")
        for name, tensor in in_dialect("image_encoder", Dialect.ORIGINAL).tensors.items()
    }
    with pytest.raises(CheckpointError, match=r"1280 channels.*config="):
        infer_config(PartTensors("image_encoder", Naming(Dialect.ORIGINAL), wide, tmp_path))


# Originals, there and back


@pytest.mark.parametrize("layout", LAYOUTS)
def test_originals_become_what_the_lists_say(converted, layout):
    wanted = listed(layout, AVERAGED[layout])
    assert agree(stored(converted[layout]), wanted)
    kinds = {tensor.dtype for tensor in wanted["image_encoder"].values()}
    assert kinds == ({torch.float16, torch.float32} if layout in ("full", "ema_only") else {torch.float32})


def test_averages_alone_become_the_same(converted):
    assert bytes_in(converted["ema_only"]) == bytes_in(converted["full"])


@pytest.mark.parametrize("layout", SPELLINGS)
def test_there_and_back(converted, layout, tmp_path):
    convert(converted[layout], tmp_path / "original.safetensors", to="original", verify=True)
    convert(tmp_path / "original.safetensors", tmp_path / "again")
    assert bytes_in(tmp_path / "again") == bytes_in(converted[layout])


def test_an_original_comes_back_as_it_was(originals, tmp_path):
    convert(originals["full"], tmp_path / "folder", ema="no")
    convert(tmp_path / "folder", tmp_path / "back.safetensors", to="original")
    source = original("full")["state_dict"]
    wanted = {
        row.name: source[row.name] for row in original_keys("full", tiny=True) if row.targets and row.op != "copy_ema"
    }
    assert agree({"": load_file(tmp_path / "back.safetensors")}, {"": wanted})


@pytest.mark.parametrize(
    ("layout", "ema", "average", "words"),
    [
        ("full", "auto", True, "moving average (EMA) used, raw weights ignored"),
        ("full", "no", False, "raw weights used, moving average (EMA) ignored"),
        ("ema_only", "yes", True, "moving average (EMA) used, no raw weights"),
        ("v2", "no", False, "raw weights used, no moving average"),
    ],
)
def test_which_weights_are_taken(originals, tmp_path, layout, ema, average, words):
    said = []
    convert(originals[layout], tmp_path, part="unet", ema=ema, log=said.append)
    assert agree(stored(tmp_path), {"unet": listed(layout, average)["unet"]})
    assert any(line.startswith("  unet: 8,505,444 parameters in 686 float32") and words in line for line in said)


@pytest.mark.parametrize(
    ("layout", "ema", "words"), [("ema_only", "no", "raw weights"), ("v2", "yes", "moving average")]
)
def test_weights_that_are_not_there(originals, tmp_path, layout, ema, words):
    with pytest.raises(CheckpointError, match=words):
        convert(originals[layout], tmp_path / "out", ema=ema)
    assert not list(tmp_path.iterdir())


def test_flat_and_nested_are_the_same(converted, tmp_path):
    write(tmp_path / "flat.ckpt", original("v2", flat=True))
    convert(tmp_path / "flat.ckpt", tmp_path / "out")
    assert bytes_in(tmp_path / "out") == bytes_in(converted["v2"])


# Folders of any age


def linked(folder, target):
    return shutil.copytree(folder, target, copy_function=os.link)


def wanted_of(published):
    """By today's names: what a published folder's tensors are to become."""
    renamed = {
        "query": "to_q",
        "key": "to_k",
        "value": "to_v",
        "proj_attn": "to_out.0",
        "vision_model.vision_model": "vision_model",
    }
    parts = {}
    for part, (_, pickled, _) in FILES.items():
        for name, tensor in torch.load(published / part / pickled, weights_only=True).items():
            if not name.endswith("position_ids"):
                for then, now in renamed.items():
                    name = name.replace(f"{then}.", f"{now}.")
                parts.setdefault(part, {})[name] = tensor
    return parts


def rewritten(folder, part, change, ending=".safetensors"):
    """Replace a part's files by one of an ending, with its tensors as `change` leaves or returns them."""
    _, pickled, safe = FILES[part]
    tensors = load_file(folder / part / safe)
    tensors = change(tensors) or tensors
    for name in (pickled, safe):
        (folder / part / name).unlink()
    if ending == ".bin":
        torch.save(tensors, folder / part / pickled)
    else:
        save_file(tensors, (folder / part / safe).with_suffix(ending))


def pickles_alone(folder):
    for part, (_, _, safe) in FILES.items():
        (folder / part / safe).unlink()


def in_shards(folder):
    imvar.UNet2DConditionModel.from_pretrained(folder / "unet").save_pretrained(
        folder / "sharded", max_shard_size="9MB"
    )
    assert len(list((folder / "sharded").glob("*-of-*"))) > 3
    shutil.rmtree(folder / "unet")
    (folder / "sharded").rename(folder / "unet")


def half_alone(folder):
    for part in FILES:
        rewritten(
            folder,
            part,
            lambda tensors: {
                name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
            },
            ".fp16.safetensors",
        )


def single_prefix(folder):
    rewritten(
        folder,
        "safety_checker",
        lambda tensors: {
            name.replace("vision_model.vision_model", "vision_model"): tensor for name, tensor in tensors.items()
        },
    )


def first_revision(folder):
    """That of old-2ddbd90: a whole CLIP model, and all of its settings."""
    old = PUBLISHED / "old-2ddbd90"
    smaller = SETTINGS | {
        "image_encoder/config.json": SETTINGS["safety_checker/config.json"],
        "feature_extractor/preprocessor_config.json": {"size": 28, "crop_size": 28},
    }
    for file in old.rglob("*.json"):
        name, settings = str(file.relative_to(old)), json.loads(file.read_text())
        for key, value in smaller.get(name, {}).items():
            settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(settings))
    rewritten(
        folder,
        "image_encoder",
        lambda tensors: tensors.update(
            {
                "text_model.embeddings.position_ids": torch.arange(77)[None],
                "logit_scale": torch.tensor(4.6),
                "text_model.final_layer_norm.weight": torch.ones(8),
                "text_projection.weight": torch.ones(24, 8),
            }
        ),
        ".bin",
    )


@pytest.mark.parametrize(("change", "part"), [(in_shards, "unet"), (single_prefix, "safety_checker")])
def test_parts_of_folders_of_any_age(published, tmp_path, change, part):
    source = linked(published, tmp_path / "source")
    change(source)
    convert(source, tmp_path / "target", part=part)
    assert agree(stored(tmp_path / "target"), {part: wanted_of(published)[part]})


@pytest.mark.parametrize("change", [pickles_alone, half_alone, first_revision])
def test_folders_of_any_age(published, tmp_path, change):
    source, target, said = linked(published, tmp_path / "source"), tmp_path / "target", []
    change(source)
    convert(source, target, log=said.append)
    wanted = wanted_of(published)
    if change is half_alone:
        wanted = {part: {name: tensor.half() for name, tensor in tensors.items()} for part, tensors in wanted.items()}
    assert agree(stored(target), wanted)
    index = json.loads((target / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionImageVariationPipeline"
    assert index["image_encoder"] == ["transformers", "CLIPVisionModelWithProjection"]
    assert index["requires_safety_checker"] is True
    variant = "fp16" if change is half_alone else None
    before = imvar.StableDiffusionImageVariationPipeline.from_pretrained(source, variant=variant)
    after = imvar.StableDiffusionImageVariationPipeline.from_pretrained(target)
    for part, value in before.components.items():
        assert settings(getattr(after, part).config) == settings(value.config)
    assert ("dropped, as no model uses it: text_model.*" in " ".join(said)) is (change is first_revision)


def test_settings_that_only_other_schedulers_know_stay(published, tmp_path):
    source = linked(published, tmp_path / "source")
    (source / "scheduler/scheduler_config.json").unlink()
    shutil.copy(PUBLISHED / "main/scheduler/scheduler_config.json", source / "scheduler")
    convert(source, tmp_path / "target")
    scheduler = imvar.PNDMScheduler.from_pretrained(tmp_path / "target", subfolder="scheduler")
    assert imvar.DDIMScheduler.from_config(scheduler.config).config.clip_sample is False


# Forks


@pytest.mark.parametrize("naming", [RAW, EMA, Naming()])
def test_what_a_fork_adds_goes_there_and_back(naming):
    fork = randomize(GatedUNet(**TINY_UNET), 1)
    for i, (name, gate) in enumerate(fork.named_parameters()):
        if name.endswith("gate"):
            gate.data.fill_(i)
    ours, keymap = fork.state_dict(), fork.keymap
    added = ours.keys() - tiny_pipeline().unet.state_dict().keys()
    assert len(added) == 8
    theirs = keymap.to_theirs(ours, naming)
    assert len(theirs) == len(ours)
    assert all(name.startswith(naming.prefix) for name in theirs)
    assert agree({"": keymap.to_ours(theirs, list(ours), naming)}, {"": ours})
