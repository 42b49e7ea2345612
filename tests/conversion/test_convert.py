"""Conversion from any folder or file: every tensor bit-identical, under its listed name, and back."""

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
from tests.support.expected_tensors import config_fields, file_contents, listed_tensors, same_tensors, stored_tensors
from tests.support.original_checkpoint import LAYOUTS, original, original_keys, write
from tests.support.published_checkpoint import FILES, PUBLISHED
from tests.support.random_checkpoint import TINY_UNET, randomize, tiny_pipeline
from tests.support.tiny_sizes import TINY_CONFIGS

MODELS = {
    "unet": imvar.UNet2DConditionModel,
    "vae": imvar.AutoencoderKL,
    "image_encoder": imvar.CLIPVisionModelWithProjection,
    "safety_checker": imvar.StableDiffusionSafetyChecker,
}
AVERAGED = {"full": True, "ema_only": True, "late": True, "v2": False}  # layouts with averaged weights
COVERING = ("full", "v2")  # which together have every name and every dtype


# The key tables against the published lists, at full size


@cache
def full_size(part: str) -> torch.nn.Module:
    """Return a model of the published size on the meta device."""
    with torch.device("meta"):
        return MODELS[part](MODELS[part].read_config(PUBLISHED / "v2.0" / part / "config.json"))


@cache
def meta(layout: str) -> SingleFile:
    """Return the file of a layout at full size, on the meta device."""
    return SingleFile(PUBLISHED, {row.name: torch.empty(row.shape, device="meta") for row in original_keys(layout)})


@pytest.mark.parametrize("layout", COVERING)
def test_every_listed_tensor_has_its_target(layout):
    rows = {row.name: row for row in original_keys(layout)}
    targets_of = {}
    for part, namings in ORIGINAL_NAMINGS.items():
        model = full_size(part)
        keymap, tensors = model.keymap, model.state_dict()
        for naming in namings:
            stored = keymap.to_file(tensors, naming)
            if not stored.keys() & rows.keys():
                continue
            assert {name: list(tensor.shape) for name, tensor in stored.items()} == {
                name: rows[name].shape for name in stored
            }
            in_part = {name: tensor for name, tensor in meta(layout).tensors.items() if name.startswith(naming.prefix)}
            loaded = keymap.from_file(in_part, tensors, naming)
            assert {name: tensor.shape for name, tensor in loaded.items()} == {
                name: tensor.shape for name, tensor in tensors.items()
            }
            for name in tensors:
                (source,) = keymap.sources(name, naming)
                targets_of.setdefault(source.name, {})[source.transform.index] = f"{part}/{name}"
    assert {name: [targets[i] for i in sorted(targets)] for name, targets in targets_of.items()} == {
        name: row.targets for name, row in rows.items() if row.targets
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_listed_tensors_are_dropped(layout):
    file = meta(layout)
    keymaps: dict[Naming, Keymap] = {
        naming: model.keymap
        for part, namings in ORIGINAL_NAMINGS.items()
        for model in [full_size(part)]
        for naming in namings
    }
    dropped = {
        name
        for versions in file.parts.values()
        for part_tensors in versions
        for name in part_tensors.tensors
        if keymaps[part_tensors.naming].droppable_pattern(name, part_tensors.naming)
    }
    dropped |= {name for name in file.tensors if file.is_droppable(name)}
    assert dropped == {row.name for row in original_keys(layout) if row.op == "drop"}
    file.check_complete()


def in_dialect(part, dialect):
    """Return the tensors of a part at full size, on the meta device, under the names of a dialect."""
    model = full_size(part)
    return PartTensors(part, Naming(dialect), model.keymap.to_file(model.state_dict(), Naming(dialect)), PUBLISHED)


@pytest.mark.parametrize("layout", [*COVERING, Dialect.PUBLISHED, Dialect.ORIGINAL])
def test_inferred_configs_are_the_published_ones(layout):
    """A wrong one would load without an error and compute wrong outputs."""
    if isinstance(layout, Dialect):
        parts = MODELS.keys() if layout is not Dialect.ORIGINAL else ORIGINAL_NAMINGS.keys()
        parts_tensors = [in_dialect(part, layout) for part in parts]
    else:
        parts_tensors = [part_tensors for versions in meta(layout).parts.values() for part_tensors in versions]
    for part_tensors in parts_tensors:
        inferred = config_fields(MODELS[part_tensors.part].validate_config(infer_config(part_tensors), PUBLISHED))
        published = config_fields(
            MODELS[part_tensors.part].read_config(PUBLISHED / "v2.0" / part_tensors.part / "config.json")
        )
        different = {name for name in inferred if inferred[name] != published[name]}
        assert different <= {"text_config"}, part_tensors.part


def test_unknown_head_counts_are_not_guessed(tmp_path):
    """OpenCLIP's ViT-H has 16 heads of 80 channels, and another activation."""
    wide = {
        name: torch.zeros([1280 if size == 1024 else size for size in tensor.shape], device="meta")
        for name, tensor in in_dialect("image_encoder", Dialect.ORIGINAL).tensors.items()
    }
    with pytest.raises(CheckpointError, match=r"1280 channels.*config="):
        infer_config(PartTensors("image_encoder", Naming(Dialect.ORIGINAL), wide, tmp_path))


# Originals to folders, and back


@pytest.mark.parametrize("layout", LAYOUTS)
def test_originals_become_the_listed_tensors(converted, layout):
    expected = listed_tensors(layout, AVERAGED[layout])
    assert same_tensors(stored_tensors(converted[layout]), expected)
    kinds = {tensor.dtype for tensor in expected["image_encoder"].values()}
    assert kinds == ({torch.float16, torch.float32} if layout in ("full", "ema_only") else {torch.float32})


def test_ema_only_files_give_the_same_result(converted):
    assert file_contents(converted["ema_only"]) == file_contents(converted["full"])


@pytest.mark.parametrize("layout", COVERING)
def test_there_and_back(converted, layout, tmp_path):
    convert(converted[layout], tmp_path / "original.safetensors", to="original", verify=True)
    convert(tmp_path / "original.safetensors", tmp_path / "again")
    assert file_contents(tmp_path / "again") == file_contents(converted[layout])


def test_an_original_is_restored(originals, tmp_path):
    convert(originals["full"], tmp_path / "folder", ema="no")
    convert(tmp_path / "folder", tmp_path / "back.safetensors", to="original")
    source = original("full")["state_dict"]
    expected = {
        row.name: source[row.name] for row in original_keys("full", tiny=True) if row.targets and row.op != "copy_ema"
    }
    assert same_tensors({"": load_file(tmp_path / "back.safetensors")}, {"": expected})


@pytest.mark.parametrize(
    ("layout", "ema", "average", "words"),
    [
        ("full", "auto", True, "moving average (EMA) used, raw weights ignored"),
        ("full", "no", False, "raw weights used, moving average (EMA) ignored"),
        ("ema_only", "yes", True, "moving average (EMA) used, no raw weights"),
        ("v2", "no", False, "raw weights used, no moving average"),
    ],
)
def test_choice_of_weights(originals, tmp_path, layout, ema, average, words):
    lines = []
    convert(originals[layout], tmp_path, part="unet", ema=ema, log=lines.append)
    assert same_tensors(stored_tensors(tmp_path), {"unet": listed_tensors(layout, average)["unet"]})
    assert any(line.startswith("  unet: 8,505,444 parameters in 686 float32") and words in line for line in lines)


@pytest.mark.parametrize(
    ("layout", "ema", "words"), [("ema_only", "no", "raw weights"), ("v2", "yes", "moving average")]
)
def test_missing_weights(originals, tmp_path, layout, ema, words):
    with pytest.raises(CheckpointError, match=words):
        convert(originals[layout], tmp_path / "out", ema=ema)
    assert not list(tmp_path.iterdir())


def test_flat_and_nested_files_give_the_same_result(converted, tmp_path):
    write(tmp_path / "flat.ckpt", original("v2", flat=True))
    convert(tmp_path / "flat.ckpt", tmp_path / "out")
    assert file_contents(tmp_path / "out") == file_contents(converted["v2"])


# Folders of every format version


def copy_linked(folder, target):
    """Copy a folder by hard links."""
    return shutil.copytree(folder, target, copy_function=os.link)


def current_tensors(published):
    """Return the tensors of a published folder under their current names, by part."""
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


def rewrite(folder, part, change, ending=".safetensors"):
    """Replace a part's weights files by one with the ending, after `change` modified or replaced its tensors."""
    _, pickled, safe = FILES[part]
    tensors = load_file(folder / part / safe)
    tensors = change(tensors) or tensors
    for name in (pickled, safe):
        (folder / part / name).unlink()
    if ending == ".bin":
        torch.save(tensors, folder / part / pickled)
    else:
        save_file(tensors, (folder / part / safe).with_suffix(ending))


def pickles_only(folder):
    for part, (_, _, safe) in FILES.items():
        (folder / part / safe).unlink()


def sharded(folder):
    imvar.UNet2DConditionModel.from_pretrained(folder / "unet").save_pretrained(
        folder / "sharded", max_shard_size="9MB"
    )
    assert len(list((folder / "sharded").glob("*-of-*"))) > 3
    shutil.rmtree(folder / "unet")
    (folder / "sharded").rename(folder / "unet")


def half_only(folder):
    for part in FILES:
        rewrite(
            folder,
            part,
            lambda tensors: {
                name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
            },
            ".fp16.safetensors",
        )


def single_prefix(folder):
    rewrite(
        folder,
        "safety_checker",
        lambda tensors: {
            name.replace("vision_model.vision_model", "vision_model"): tensor for name, tensor in tensors.items()
        },
    )


def first_revision(folder):
    """Make a folder like revision old-2ddbd90: a whole CLIP model, and its config."""
    old = PUBLISHED / "old-2ddbd90"
    smaller = TINY_CONFIGS | {
        "image_encoder/config.json": TINY_CONFIGS["safety_checker/config.json"],
        "feature_extractor/preprocessor_config.json": {"size": 28, "crop_size": 28},
    }
    for file in old.rglob("*.json"):
        name, settings = str(file.relative_to(old)), json.loads(file.read_text())
        for key, value in smaller.get(name, {}).items():
            settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(settings))
    rewrite(
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


@pytest.mark.parametrize(("change", "part"), [(sharded, "unet"), (single_prefix, "safety_checker")])
def test_parts_of_older_folders(published, tmp_path, change, part):
    source = copy_linked(published, tmp_path / "source")
    change(source)
    convert(source, tmp_path / "target", part=part)
    assert same_tensors(stored_tensors(tmp_path / "target"), {part: current_tensors(published)[part]})


@pytest.mark.parametrize("change", [pickles_only, half_only, first_revision])
def test_older_folders(published, tmp_path, change):
    source, target, lines = copy_linked(published, tmp_path / "source"), tmp_path / "target", []
    change(source)
    convert(source, target, log=lines.append)
    expected = current_tensors(published)
    if change is half_only:
        expected = {
            part: {name: tensor.half() for name, tensor in tensors.items()} for part, tensors in expected.items()
        }
    assert same_tensors(stored_tensors(target), expected)
    index = json.loads((target / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionImageVariationPipeline"
    assert index["image_encoder"] == ["transformers", "CLIPVisionModelWithProjection"]
    assert index["requires_safety_checker"] is True
    variant = "fp16" if change is half_only else None
    before = imvar.StableDiffusionImageVariationPipeline.from_pretrained(source, variant=variant)
    after = imvar.StableDiffusionImageVariationPipeline.from_pretrained(target)
    for part, value in before.components.items():
        assert config_fields(getattr(after, part).config) == config_fields(value.config)
    assert ("dropped, as no model uses it: text_model.*" in " ".join(lines)) is (change is first_revision)


def test_fields_of_other_schedulers_are_kept(published, tmp_path):
    source = copy_linked(published, tmp_path / "source")
    (source / "scheduler/scheduler_config.json").unlink()
    shutil.copy(PUBLISHED / "main/scheduler/scheduler_config.json", source / "scheduler")
    convert(source, tmp_path / "target")
    scheduler = imvar.PNDMScheduler.from_pretrained(tmp_path / "target", subfolder="scheduler")
    assert imvar.DDIMScheduler.from_config(scheduler.config).config.clip_sample is False


# Forks


@pytest.mark.parametrize("naming", [RAW, EMA, Naming()])
def test_tensors_of_a_fork_are_converted_and_restored(naming):
    fork = randomize(GatedUNet(**TINY_UNET), 1)
    for i, (name, gate) in enumerate(fork.named_parameters()):
        if name.endswith("gate"):
            gate.data.fill_(i)
    tensors, keymap = fork.state_dict(), fork.keymap
    added = tensors.keys() - tiny_pipeline().unet.state_dict().keys()
    assert len(added) == 8
    stored = keymap.to_file(tensors, naming)
    assert len(stored) == len(tensors)
    assert all(name.startswith(naming.prefix) for name in stored)
    assert same_tensors({"": keymap.from_file(stored, list(tensors), naming)}, {"": tensors})
