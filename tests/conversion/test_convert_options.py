"""Options and report of a conversion: parts, dtypes, configs, targets."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import imvar
from imvar import CheckpointError, StableDiffusionImageVariationPipeline
from imvar.conversion import convert
from tests.support.expected_tensors import file_contents, same_tensors, stored_tensors
from tests.support.published_checkpoint import FILES
from tests.support.random_checkpoint import TINY_ENCODER

PARTS = {
    "unet": imvar.UNet2DConditionModel,
    "vae": imvar.AutoencoderKL,
    "image_encoder": imvar.CLIPVisionModelWithProjection,
    "safety_checker": imvar.StableDiffusionSafetyChecker,
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# Parts and dtypes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", ["diffusers", "original"])
def test_dtypes(converted, checkpoint, tmp_path, to, dtype):
    """Half and single precision sources."""
    source = shutil.copytree(checkpoint, tmp_path / "source")
    convert(converted["full"], source, part="image_encoder")
    expected = {
        part: {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
        for part, tensors in stored_tensors(source).items()
    }
    convert(
        source, tmp_path / "new.safetensors" if to == "original" else tmp_path / "new", to=to, dtype=dtype, verify=True
    )
    if to == "original":
        convert(tmp_path / "new.safetensors", tmp_path / "new")
        del expected["safety_checker"]
    assert same_tensors(stored_tensors(tmp_path / "new"), expected)


@pytest.mark.parametrize("to", ["diffusers", "original"])
def test_tensors_that_become_zero_are_named(checkpoint, tmp_path, to):
    source, target = (
        shutil.copytree(checkpoint, tmp_path / "source"),
        tmp_path / ("x.safetensors" if to[0] == "o" else "x"),
    )
    files = {}
    for part, name in (
        ("unet", "conv_in.bias"),
        ("image_encoder", "vision_model.encoder.layers.0.self_attn.q_proj.weight"),
    ):
        (file,) = (source / part).glob("*.safetensors")
        tensors = load_file(file)
        save_file(tensors | {name: torch.full_like(tensors[name], 1e-8)}, file, {"format": "pt"})
        files[file] = name
    with pytest.warns(UserWarning, match="too small for torch.float16 and become zero") as caught:
        convert(source, target, to=to, dtype="fp16", verify=True)
    (message,) = (str(warning.message) for warning in caught)
    assert any(message.startswith(f"{name} of {file} and 1 more: ") for file, name in files.items())
    with warnings.catch_warnings(action="error"):
        convert(source, target, to=to, dtype="bf16")


def test_tensors_of_several_dtypes_are_not_stored_as_one(checkpoint, tmp_path):
    """The original layout has one tensor for q, k and v, which would widen two of them."""
    source, target = shutil.copytree(checkpoint, tmp_path / "source"), tmp_path / "original.safetensors"
    (file,) = (source / "image_encoder").glob("*.safetensors")
    dtypes = {"q_proj": torch.float16, "k_proj": torch.bfloat16, "v_proj": torch.float32}
    tensors = {name: t.to(dtypes.get(name.split(".")[-2], t.dtype)) for name, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    expected = r"one dtype for (.*\.[qkv]_proj\.(weight|bias)(, )?){3}, which are one tensor in a single file"
    got = r"got (b?float\d\d(, )?){3}; pass dtype= \(--dtype\)"
    with pytest.raises(CheckpointError, match=f"{expected}.*{got}") as caught:
        convert(source, target, to="original")
    assert caught.value.path == file
    assert caught.value.key in tensors
    assert not target.exists()
    convert(source, tmp_path / "folder", verify=True)
    assert same_tensors({"": load_file(tmp_path / "folder" / "image_encoder" / file.name)}, {"": tensors})
    convert(source, target, to="original", dtype="fp32", verify=True)
    convert(target, tmp_path / "back")
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    assert same_tensors({"": load_file(tmp_path / "back" / "image_encoder" / file.name)}, {"": wide})


@pytest.mark.parametrize("part", PARTS)
def test_one_part(checkpoint, tmp_path, part):
    """From a pipeline's folder, from its own folder, and from its file next to its config, with the same result."""
    file = checkpoint / part / FILES[part][2]
    for i, source in enumerate((checkpoint, checkpoint / part, file)):
        options = {"part": part} if source != checkpoint / part else {}
        report = convert(source, tmp_path / str(i), **options)
        assert list(report.parts) == [part]
        assert [path.name for path in (tmp_path / str(i)).iterdir()] == [part]
        assert file_contents(tmp_path / str(i)) == file_contents(tmp_path / "0")
    before, after = (PARTS[part].from_pretrained(folder / part) for folder in (checkpoint, tmp_path / "0"))
    assert same_tensors({"": before.state_dict()}, {"": after.state_dict()})


@pytest.mark.parametrize(
    ("part", "ending"),
    [("unet", ".pt"), ("vae", ".safetensors"), ("image_encoder", ".bin"), ("safety_checker", ".ckpt")],
)
def test_a_state_dict_of_imvar(published, tmp_path, part, ending):
    """Without a config: it is inferred from the tensors and the published one."""
    model = PARTS[part].from_pretrained(published, subfolder=part)
    file = tmp_path / f"weights{ending}"
    (save_file if ending == ".safetensors" else torch.save)(model.state_dict(), file)
    convert(file, tmp_path / "out")
    after = PARTS[part].from_pretrained(tmp_path / "out", subfolder=part)
    assert same_tensors({"": model.state_dict()}, {"": after.state_dict()})


def test_shards(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "out", max_shard_size="100KB", verify=True)
    sizes = [path.stat().st_size for path in (tmp_path / "out/unet").glob("*-of-*")]
    assert len(sizes) > 3
    assert max(sizes) < 120_000  # headers are not counted
    convert(tmp_path / "out", tmp_path / "out", verify=True)  # in place, without shards
    assert [path.name for path in (tmp_path / "out/unet").glob("*.safetensors*")] == [FILES["unet"][2]]
    convert(checkpoint, tmp_path / "once")
    assert file_contents(tmp_path / "out") == file_contents(tmp_path / "once")


# Configs and parts from other checkpoints


def test_filled(checkpoint, small, tmp_path):
    lines = []
    convert(small, tmp_path / "filled", fill=checkpoint, log=lines.append)
    assert f"filled from {checkpoint}: safety_checker" in lines
    convert(checkpoint, tmp_path / "complete")
    assert file_contents(tmp_path / "filled") == file_contents(tmp_path / "complete")
    lines.clear()
    convert(tmp_path / "complete", tmp_path / "x", fill=small, log=lines.append)
    assert f"filled from {small}: nothing, as it has no missing part" in lines


def test_parts_of_different_widths(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "source", ignore=shutil.ignore_patterns("image_encoder"))
    imvar.CLIPVisionModelWithProjection(**TINY_ENCODER | {"projection_dim": 20}).save_pretrained(tmp_path / "encoder")
    with pytest.raises(CheckpointError, match=r"expected projection_dim 24, the cross_attention_dim of .*, got 20"):
        convert(source, tmp_path / "target", fill=tmp_path / "encoder")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("paths", [(None, "x"), ("x", 3)])
def test_invalid_paths(paths):
    with pytest.raises(TypeError, match="expected a path, got"):
        convert(*paths)


def test_a_missing_checker_is_reported(converted, originals, tmp_path):
    index = json.loads((converted["full"] / "model_index.json").read_text())
    assert (index["safety_checker"], index["requires_safety_checker"]) == ([None, None], False)
    report = convert(originals["full"], tmp_path / "x", dry_run=True)
    assert report.left_out == {"safety_checker": "not in the source; fill= (--fill) takes it from another checkpoint"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_settings_from_a_folder(checkpoint, small, tmp_path, kind):
    settings = shutil.copytree(checkpoint, tmp_path / "settings", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, key, value in (
        ("unet/config.json", "sample_size", 24),
        ("vae/config.json", "scaling_factor", 0.5),
        ("scheduler/scheduler_config.json", "_class_name", "DDIMScheduler"),
    ):
        text = json.loads((settings / name).read_text())
        (settings / name).write_text(json.dumps(text | {key: value}))
    convert(small if kind == "file" else checkpoint, tmp_path / "out", config=settings)
    pipe = StableDiffusionImageVariationPipeline.from_pretrained(
        tmp_path / "out", safety_checker=None, requires_safety_checker=False
    )
    assert (pipe.unet.config.sample_size, pipe.vae.config.scaling_factor) == (24, 0.5)
    assert type(pipe.scheduler) is imvar.DDIMScheduler
    shutil.rmtree(settings / "vae")
    with pytest.raises(CheckpointError, match=r"expected vae/config\.json or config\.json"):
        convert(small if kind == "file" else checkpoint, tmp_path / "other", config=settings)
    shutil.copytree(checkpoint / "vae", settings / "vae")
    (settings / "scheduler/scheduler_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json.*got None"):
        convert(small if kind == "file" else checkpoint, tmp_path / "other", config=settings)
    assert not (tmp_path / "other").exists()


def test_the_scheduler_class_is_that_of_the_index(checkpoint, tmp_path):
    """As in `from_pretrained`, of imvar and of diffusers."""
    source = shutil.copytree(checkpoint, tmp_path / "source")
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(
        json.dumps(
            index
            | {
                "scheduler": ["diffusers", "DDIMScheduler"],
                "safety_checker": [None, None],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "requires_safety_checker": False,
            }
        )
    )
    (source / "text_encoder").mkdir()
    lines = []
    convert(source, tmp_path / "target", log=lines.append)
    pipe = StableDiffusionImageVariationPipeline.from_pretrained(tmp_path / "target")
    assert type(pipe.scheduler) is imvar.DDIMScheduler
    assert pipe.safety_checker is None
    assert not (tmp_path / "target/safety_checker").exists()
    assert any("text_encoder" in line and "ignored" in line for line in lines)


# Target


def test_legacy_sample_sizes_are_corrected(checkpoint, tmp_path):
    """Before diffusers 0.9 a sample_size below 64 was wrong; pipelines correct it by the version in the config."""
    source = shutil.copytree(checkpoint, tmp_path / "source")
    path = source / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_diffusers_version": "0.4.0.dev0", "sample_size": 32}))
    convert(source, tmp_path / "target")
    sizes = {
        StableDiffusionImageVariationPipeline.from_pretrained(folder).unet.config.sample_size
        for folder in (source, tmp_path / "target")
    }
    assert sizes == {64}


def test_in_place(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "folder")
    (folder / "README.md").write_text("mine")
    convert(folder, tmp_path / "fresh")
    convert(folder, folder, verify=True)
    assert file_contents(folder) == file_contents(tmp_path / "fresh") | {"README.md": b"mine"}


def test_an_original_in_place(small, tmp_path):
    file = shutil.copy(small, tmp_path / "x.safetensors")
    convert(file, file, to="original", dtype="bf16", verify=True)
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_other_files_in_the_target_stay(small, checkpoint, tmp_path):
    target = tmp_path / "target"
    convert(checkpoint, target, max_shard_size="100KB")
    (target / "photos").mkdir()
    (target / "photos" / "cat.jpg").write_bytes(b"cat")
    (target / "unet" / "notes.txt").write_text("mine")
    convert(checkpoint, target)
    convert(checkpoint, tmp_path / "fresh")
    assert file_contents(target) == file_contents(tmp_path / "fresh") | {
        "photos/cat.jpg": b"cat",
        "unet/notes.txt": b"mine",
    }


def test_a_dry_run_writes_nothing(small, tmp_path):
    lines = []
    report = convert(small, tmp_path / "new" / "folder", dry_run=True, log=lines.append)
    assert not list(tmp_path.iterdir())
    assert lines[-1] == "dry run: nothing was written"
    assert set(report.parts) == {"unet", "vae", "image_encoder", "scheduler", "feature_extractor"}
    assert not report.written


# Report


def test_report(originals, tmp_path):
    lines = []
    report = convert(originals["full"], tmp_path / "out", log=lines.append, verify=True)
    text = "\n".join(lines)
    for words in (
        f"source: {originals['full']}, a single file in the original layout",
        "26 float16 and 14 float32 tensors",
        "vae: 5,252,487 parameters in 248 float32 tensors; the original names",
        "dropped, as no model uses it: cond_stage_model.model.transformer.*, 24 tensors",
        "scheduler: PNDMScheduler, config from the published checkpoint",
        "dropped: 14 tensors of the noise schedule and of the moving average's state",
        "ignored: epoch, global_step, pytorch-lightning_version, callbacks, optimizer_states",
        "without safety_checker: not in the source",
        "dtype keep",
        "verified: ",
    ):
        assert words in text, words
    files = sorted((tmp_path / "out").glob("*/*.safetensors"))
    assert sorted(file.path for file in report.written) == files
    for file in report.written:
        with safe_open(file.path, "pt") as opened:
            assert file.tensors == len(opened.keys())
        content = file.path.read_bytes()
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert f"wrote {file.path}: {file.tensors} tensors, " in text
        assert file.sha256 in text


def test_the_report_names_the_file(published, tmp_path):
    lines = []
    convert(published, tmp_path / "x", dry_run=True, log=lines.append)
    assert any("diffusers' names of 2022" in line and "diffusion_pytorch_model.safetensors" in line for line in lines)


def test_the_report_names_older_files_in_the_target(small, tmp_path):
    lines = []
    imvar.AutoencoderKL.from_single_file(small).save_pretrained(
        tmp_path / "vae", safe_serialization=False, variant="fp16"
    )
    convert(small, tmp_path, log=lines.append)
    assert [line for line in lines if "kept: " in line] == [
        f"kept: {tmp_path}/vae/diffusion_pytorch_model.fp16.bin, weights of an earlier checkpoint"
    ]
    assert (tmp_path / "vae" / "diffusion_pytorch_model.fp16.bin").exists()


@pytest.mark.parametrize("name", ["", "link", "other/unet"])
def test_a_part_of_the_source_is_refused_as_target(published, tmp_path, name):
    (tmp_path / "link").symlink_to(published / "unet")
    (tmp_path / "other").symlink_to(published)
    target = tmp_path / name if name else published / "unet"
    with pytest.raises(imvar.InputError, match="target: expected a folder outside the source"):
        convert(published, target)


@pytest.mark.parametrize("to", ["diffusers", "original"])
@pytest.mark.parametrize("tamper", ["a bit", "a tensor less", "another dtype"])
def test_verify_detects_corruption(small, tmp_path, monkeypatch, to, tamper):
    """The file is corrupted between writing and reading back."""
    module = sys.modules["imvar.conversion.layouts"]
    reads = "read_checkpoint" if to == "original" else "read_weights"
    real = getattr(module, reads)

    def corrupted(*args):
        first, second = real(*args)
        tensors = first if to == "original" else second
        name = sorted(tensors)[len(tensors) // 2]
        kept = tensors.pop(name)
        if tamper == "a bit":
            tensors[name] = kept.clone()
            tensors[name].view(-1).view(torch.uint8)[-1] ^= 1
        elif tamper == "another dtype":
            tensors[name] = kept.double()
        return first, second

    target = tmp_path / ("x.safetensors" if to == "original" else "x")
    convert(small, target, to=to, verify=True)
    monkeypatch.setattr(module, reads, corrupted)
    convert(small, target, to=to)
    before = file_contents(tmp_path)
    with pytest.raises(CheckpointError, match="expected the values that were written") as caught:
        convert(small, target, to=to, verify=True, dtype="bf16")
    assert caught.value.key
    assert file_contents(tmp_path) == before  # it was not replaced
