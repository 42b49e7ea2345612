"""Generated original single files: they have the published sizes and tensors, and diffusers can read them."""

from __future__ import annotations

import pickletools
import zipfile
from collections import Counter
from math import prod

import pytest
import torch

import imvar
from tests.support.original_checkpoint import LAYOUTS, Row, original, original_keys
from tests.support.published_checkpoint import key_list, tiny_folder, write_checkpoint

PLAIN = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"}
LIGHTNING = {
    "pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint",
    "numpy.core.multiarray scalar",
    "numpy dtype",
    "_codecs encode",
}
GLOBALS = {
    "full": PLAIN | LIGHTNING | {"torch HalfStorage", "torch IntStorage"},
    "ema_only": PLAIN | {"torch HalfStorage", "torch IntStorage"},
    "late": PLAIN | LIGHTNING | {"torch IntStorage"},
    "v2": PLAIN | {"torch LongStorage"},
}
GROUPS = {  # number of tensors, and bytes, of the schedule, the raw and the averaged weights, the VAE, CLIP
    "full": [(12, 48_000), (686, 3_438_083_856), (688, 3_438_083_864), (248, 334_615_452), (446, 932_051_972)],
    "ema_only": [(12, 48_000), (688, 3_438_083_864), (248, 334_615_452), (446, 932_051_972)],
    "late": [(12, 48_000), (686, 3_438_083_856), (688, 3_438_083_864), (248, 334_615_452), (302, 1_370_248_196)],
    "v2": [(686, 3_438_083_856), (248, 334_615_452), (393, 1_215_866_888)],
}


@pytest.fixture(scope="module")
def full():
    return original("full")["state_dict"]


def target_shapes(row: Row) -> list[list[int]]:
    """Return the shape of each target of a tensor."""
    match row.op:
        case "squeeze_hw":
            assert row.shape[2:] == [1, 1]
            return [row.shape[:2]]
        case "split3_dim0":
            return [[row.shape[0] // 3, *row.shape[1:]]] * 3
        case "transpose":
            return [row.shape[::-1]]
        case "drop":
            return []
    return [row.shape]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lists_have_the_published_size(layout):
    groups = Counter(), Counter()
    for row in original_keys(layout):
        group = row.name.partition(".")[0] if "." in row.name else "schedule"
        groups[0][group] += 1
        groups[1][group] += prod(row.shape) * row.dtype.itemsize
    assert list(zip(*(group.values() for group in groups), strict=True)) == GROUPS[layout]


def test_ema_only_has_the_published_size():
    rows = original_keys("ema_only")
    assert len(rows) == 1394
    assert sum(prod(row.shape) * row.dtype.itemsize for row in rows) == 4_704_799_288
    assert Counter(row.dtype for row in rows if row.name.startswith("cond_stage_model.")) == {
        torch.float16: 291,
        torch.float32: 155,
    }


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_target_has_one_source(layout, tiny):
    rows = original_keys(layout, tiny)
    if layout in ("full", "late"):
        averages = {(row.name.replace(".", ""), *row.targets) for row in rows if row.op == "copy_ema"}
        raw = {
            (f"model_ema{row.name.removeprefix('model')}".replace(".", ""), *row.targets)
            for row in rows
            if row.name.startswith("model.")
        }
        assert raw == averages
        rows = [row for row in rows if row.op != "copy_ema"]
    targets = [(target, shape) for row in rows for target, shape in zip(row.targets, target_shapes(row), strict=True)]
    expected = {
        f"{part}/{name}": shape
        for part in ("unet", "vae", "image_encoder")
        for name, (shape, _) in key_list(part, tiny).items()
        if not name.endswith("position_ids")
    }
    assert dict(targets) == expected
    assert len(targets) == len(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pickles_refer_to_the_published_globals(originals, layout):
    with zipfile.ZipFile(originals[layout]) as file:
        text = file.read(f"{layout}/data.pkl")
        assert file.testzip() is None
    names = {name for code, name, _ in pickletools.genops(text) if code.name in ("GLOBAL", "STACK_GLOBAL")}
    assert names == GLOBALS[layout]


@pytest.mark.parametrize("layout", ["ema_only", "v2"])
def test_safe_loading_returns_the_drawn_values(originals, layout):
    loaded, drawn = torch.load(originals[layout], weights_only=True), original(layout)
    assert loaded.keys() == {"state_dict"}
    assert list(loaded["state_dict"]) == [row.name for row in original_keys(layout, tiny=True)]
    for row in original_keys(layout, tiny=True):
        tensor = loaded["state_dict"][row.name]
        assert (list(tensor.shape), tensor.dtype) == (row.shape, row.dtype)
        assert tensor.equal(drawn["state_dict"][row.name])


@pytest.mark.parametrize("layout", ["full", "late"])
def test_safe_loading_refuses_lightning_files(originals, layout):
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(originals[layout], weights_only=True)


def test_flat_files_contain_only_tensors():
    assert list(original("v2", flat=True)) == [row.name for row in original_keys("v2", tiny=True)]


def test_optimizers_keep_two_moments_of_each_raw_weight():
    content = original("full", optimizer=True)
    (optimizer,) = content["optimizer_states"]
    raw = [tensor for name, tensor in content["state_dict"].items() if name.startswith("model.")]
    assert len(optimizer["state"]) == len(optimizer["param_groups"][0]["params"]) == len(raw)
    for tensor, moments in zip(raw, optimizer["state"].values(), strict=True):
        assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == tensor.shape


def test_layouts_share_values_and_averages_differ(full):
    averages = original("ema_only")["state_dict"]
    assert averages.keys() == {name for name in full if not name.startswith("model.")}
    assert all(tensor.equal(full[name]) for name, tensor in averages.items())
    raw = [name for name in full if name.startswith("model.")]
    assert not any(full[name].equal(full[f"model_ema.{name.removeprefix('model.').replace('.', '')}"]) for name in raw)
    assert not any(
        tensor.equal(full[name]) for name, tensor in original("full", seed=1)["state_dict"].items() if tensor.ndim
    )


# diffusers and transformers


def test_diffusers_converts_the_unet_and_the_vae(full, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    tiny_folder(tmp_path)
    for part, kind, convert in (
        ("unet", diffusers.UNet2DConditionModel, utils.convert_ldm_unet_checkpoint),
        ("vae", diffusers.AutoencoderKL, utils.convert_ldm_vae_checkpoint),
    ):
        model = kind.from_config(kind.load_config(tmp_path, subfolder=part))
        converted = convert(dict(full), model.config)
        model.load_state_dict(converted, strict=True)
        for row in original_keys("full", tiny=True):
            if row.targets and row.op != "copy_ema" and row.targets[0].startswith(f"{part}/"):
                name = row.targets[0].removeprefix(f"{part}/")
                assert converted[name].equal(full[row.name].reshape(target_shapes(row)[0])), row


def test_transformers_loads_the_image_encoder(tmp_path):
    transformers = pytest.importorskip("transformers")
    tiny_folder(tmp_path)
    prefix, tensors = "cond_stage_model.transformer.", original("v2", flat=True)
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    settings = transformers.CLIPVisionConfig.from_pretrained(tmp_path / "image_encoder")
    model, report = transformers.CLIPVisionModelWithProjection.from_pretrained(
        None, config=settings, state_dict=named, output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.visual_projection.weight.equal(named["visual_projection.weight"])


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
def test_tiny_folders_load_as_pipelines(tmp_path, photo, ending):
    write_checkpoint(tmp_path, tiny=True, endings=[ending])
    assert {path.suffix for path in tmp_path.glob("*/*model*")} == {ending}
    pipe = imvar.StableDiffusionImageVariationPipeline.from_pretrained(tmp_path)
    assert pipe(photo, num_inference_steps=1).images[0].size == (64, 64)
