"""Checkpoints that cannot be converted: the error names the tensor and the file, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import weights_convert
from imvar import CheckpointError, ImvarError
from imvar.conversion import convert
from tests.support.expected_tensors import file_contents

FLOAT8 = torch.float8_e4m3fn
RAW, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."


def rewrite(file, change):
    """Let `change` modify the tensors of a file, whose metadata stays."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata)


def put(name, value):
    def change(tensors):
        tensors[name].view(-1)[-1] = value

    return change


def both(name, other):
    """Add a second copy of a tensor under another name."""
    return lambda tensors: tensors.update({other: tensors[name].clone()})


FAULTS = [  # change of an original file, and words of the error
    (lambda t: t.pop(f"{RAW}time_embed.0.bias"), f"1 tensor missing: {RAW}time_embed.0.bias"),
    (
        lambda t: t.pop(f"{CLIP}visual.transformer.resblocks.1.attn.in_proj_bias"),
        f"1 tensor missing: {CLIP}visual.transformer.resblocks.1.attn.in_proj_bias",
    ),
    (lambda t: t.update({f"{VAE}encoder.extra": torch.ones(1)}), f"1 unknown tensor: {VAE}encoder.extra"),
    (
        lambda t: t.update({f"{CLIP}visual.text_projection": torch.ones(1)}),
        f"1 unknown tensor: {CLIP}visual.text_projection",
    ),
    (lambda t: t.update({"control_model.x": torch.ones(1)}), "1 unknown tensor: control_model.x"),
    (
        lambda t: t.update({f"{RAW}out.2.bias": torch.ones(5)}),
        f"{RAW}out.2.bias: expected shape (4,) by",
    ),
    (
        lambda t: t.update({f"{CLIP}visual.proj": t[f"{CLIP}visual.proj"].mT.contiguous()}),
        "proj: expected shape",
    ),
    (
        lambda t: t.update({f"{VAE}quant_conv.bias": torch.ones(8).char()}),
        "expected floating-point values, got torch.int8",
    ),
    (put(f"{VAE}decoder.mid.attn_1.q.weight", float("nan")), "decoder.mid.attn_1.q.weight: expected finite"),
    (
        put(f"{CLIP}visual.transformer.resblocks.0.attn.in_proj_weight", float("-inf")),
        "attn.in_proj_weight: expected finite",
    ),
    (
        lambda t: t.update({f"cond_stage_model.transformer.{name}": torch.ones(1) for name in ("vision_model.x",)}),
        "expected one image_encoder, got 2",
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=[words for _, words in FAULTS])
@pytest.mark.parametrize("to", ["diffusers", "original"])
def test_originals(small, tmp_path, capsys, fault, to):
    change, words = fault
    file = shutil.copy(small, tmp_path / "file.safetensors")
    rewrite(file, change)
    target = tmp_path / ("new.safetensors" if to == "original" else "new")
    assert weights_convert.main([str(file), str(target), "--to", to]) == 1
    (lines,) = capsys.readouterr().err.splitlines()
    assert words in lines
    assert str(file) in lines
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]


Fault = namedtuple("Fault", "part change options words")
IN_FOLDERS = [
    Fault("unet", lambda t: t.pop("conv_in.bias"), {}, "1 tensor missing: conv_in.bias"),
    Fault(
        "vae",
        both("encoder.mid_block.attentions.0.to_q.bias", "encoder.mid_block.attentions.0.query.bias"),
        {},
        "to_q.bias and encoder.mid_block.attentions.0.query.bias: expected one spelling of each tensor",
    ),
    Fault(
        "safety_checker",
        both("vision_model.pre_layrnorm.bias", "vision_model.vision_model.pre_layrnorm.bias"),
        {},
        "vision_model.vision_model.pre_layrnorm.bias: expected one spelling of each tensor",
    ),
    Fault("unet", put("conv_out.weight", float("inf")), {}, "conv_out.weight: expected finite values"),
    Fault("unet", put("conv_out.weight", -65536.0), {"dtype": "fp16"}, "65536 of conv_out.weight in "),
    Fault("unet", put("conv_out.weight", 3.4e38), {"dtype": "bf16"}, "torch.bfloat16, which cannot hold 3.4e+38"),
    Fault(
        "safety_checker",
        put("concept_embeds_weights", float("nan")),
        {},
        "weights: expected finite values",
    ),
    Fault(
        "vae",
        lambda t: t.update({"quant_conv.bias": torch.full((8,), float("nan")).to(FLOAT8)}),
        {},
        "quant_conv.bias: expected finite values",
    ),
    Fault("vae", lambda t: t.update({"quant_conv.bias": torch.ones(8, dtype=torch.complex64)}), {}, "complex64"),
]


@pytest.mark.parametrize("fault", IN_FOLDERS, ids=lambda fault: f"{fault.part}: {fault.words}")
def test_folders(checkpoint, tmp_path, fault):
    """An existing target stays unchanged, byte for byte."""
    source, target = shutil.copytree(checkpoint, tmp_path / "source"), shutil.copytree(checkpoint, tmp_path / "target")
    before = file_contents(target)
    (file,) = (source / fault.part).glob("*.safetensors")
    rewrite(file, fault.change)
    with pytest.raises(ImvarError) as caught:
        convert(source, target, **fault.options)
    assert fault.words in str(caught.value)
    assert str(file) in str(caught.value)
    assert file_contents(target) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_eight_bit_values_are_checked_and_cast(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    (file,) = (source / "vae").glob("*.safetensors")
    rewrite(file, lambda tensors: tensors.update({"quant_conv.bias": torch.full((8,), 0.5).to(FLOAT8)}))
    convert(source, tmp_path / "kept", part="vae", verify=True)
    convert(source, tmp_path / "wide", part="vae", dtype="fp32", verify=True)
    kept, wide = (load_file(tmp_path / name / "vae" / file.name)["quant_conv.bias"] for name in ("kept", "wide"))
    assert (kept.dtype, wide.tolist()) == (FLOAT8, [0.5] * 8)


@pytest.mark.parametrize(
    "swapped",
    [("unet", "vae"), ("vae", "unet"), ("safety_checker", "image_encoder"), ("image_encoder", "safety_checker")],
    ids=" for ".join,
)
def test_another_parts_weights(checkpoint, tmp_path, swapped):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    (file,), (other,) = ((source / part).glob("*.safetensors") for part in swapped)
    file.write_bytes(other.read_bytes())
    with pytest.raises(
        ImvarError, match=f"expected weights of the {swapped[0]}, got those of the {swapped[1]}"
    ) as caught:
        convert(source, tmp_path / "target")
    assert caught.value.path == file
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!doctype html><p>Not found", "web page"),
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git-lfs pointer"),
        (b"\x80\x02}.", "expected a file of tensors"),
        (b"PK\x03\x04 and then nothing", "expected a file of tensors"),
    ],
)
@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors", "unet/diffusion_pytorch_model.bin"])
def test_sources_that_are_not_checkpoints(tmp_path, capsys, name, content, words):
    file = tmp_path / "source" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    (file.parent / "config.json").write_text("{}")
    source = file if file.name == "x.ckpt" or file.name == "x.safetensors" else tmp_path / "source"
    assert weights_convert.main([str(source), str(tmp_path / "target")]) == 1
    (lines,) = capsys.readouterr().err.splitlines()
    assert str(file) in lines
    assert words in lines
    assert not (tmp_path / "target").exists()


def test_folders_without_a_known_part(tmp_path):
    with pytest.raises(ImvarError, match="expected folders of parts, such as unet/, or the weights of one"):
        convert(tmp_path, tmp_path / "target")
    (tmp_path / "unet").mkdir()
    with pytest.raises(ImvarError, match="expected weights, got none"):
        convert(tmp_path, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]


def test_a_listed_part_that_is_missing(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    shutil.rmtree(source / "vae")
    with pytest.raises(CheckpointError, match=r"got no vae; pass fill=") as caught:
        convert(source, tmp_path / "target")
    assert (caught.value.path, caught.value.key) == (source / "model_index.json", "vae")
    assert not (tmp_path / "target").exists()
    convert(source, tmp_path / "unet", part="unet")
    convert(source, tmp_path / "target", fill=checkpoint)
    assert file_contents(tmp_path / "target") == file_contents(checkpoint)


def test_parts_of_two_checkpoints_are_not_mixed(small, checkpoint, tmp_path):
    target = shutil.copytree(checkpoint, tmp_path / "target")
    before = file_contents(target)
    with pytest.raises(CheckpointError, match="expected no part of another checkpoint") as caught:
        convert(small, target)
    assert caught.value.path == target / "safety_checker"
    assert file_contents(target) == before


def test_unlisted_folders_are_reported(checkpoint, tmp_path):
    source, lines = shutil.copytree(checkpoint, tmp_path / "source"), []
    shutil.copytree(source / "unet", source / "unet_ema")
    convert(source, tmp_path / "target", log=lines.append)
    assert "  ignored: unet_ema" in lines
    assert not (tmp_path / "target" / "unet_ema").exists()


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (1e5, "fp16", "expected bf16 or fp32"),
        (3.4028e38, "bf16", "expected fp32, got torch.bfloat16"),
        (1e300, "fp32", "expected keep, got torch.float32"),
    ],
)
def test_the_error_names_a_wide_enough_dtype(checkpoint, tmp_path, value, dtype, words):
    source = shutil.copytree(checkpoint / "vae", tmp_path / "vae")
    file = source / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"quant_conv.bias": torch.full((8,), value, dtype=torch.float64)}, file)
    with pytest.raises(ImvarError, match=words):
        convert(source, tmp_path / "out", dtype=dtype)


def test_a_full_disk_is_detected_before_writing(small, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "free")(1_000_000))
    with pytest.raises(ImvarError, match="free disk space, got 1000000 bytes; nothing was written"):
        convert(small, tmp_path / "a" / "b")
    convert(small, tmp_path / "half", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_interrupted_while_writing(small, checkpoint, tmp_path, monkeypatch, capsys):
    """By Ctrl-C, in the last file."""
    target = shutil.copytree(checkpoint, tmp_path / "target")
    before = file_contents(target)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("imvar.conversion.layouts.index_text", stop)
    assert weights_convert.main([str(small), str(target), "--fill", str(checkpoint)]) == 130
    assert "the target is unchanged" in capsys.readouterr().err
    assert file_contents(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("to", ["diffusers", "original"])
def test_interrupted_after_writing(small, tmp_path, monkeypatch, capsys, to):
    """By Ctrl-C, while the old files are removed."""
    target = tmp_path / ("model.safetensors" if to == "original" else "model")
    convert(small, target, to=to, dtype="fp16")
    real = shutil.rmtree

    def stop(path, *args, **options):
        real(path, *args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", stop)
    assert weights_convert.main([str(small), str(target), "--to", to]) == 130
    assert capsys.readouterr().err == "imvar: interrupted; the target has changed\n"


@pytest.mark.parametrize(
    "settings", [{"_class_name": "UNet2DConditionModel"}, {"architectures": ["BertModel"]}], ids=str
)
def test_configs_of_other_models(published, tmp_path, settings):
    """A download folder may contain a config.json of another model: ignored there, refused as config=."""
    file = shutil.copy(published / "image_encoder/model.safetensors", tmp_path / "encoder.safetensors")
    convert(file, tmp_path / "single")
    (tmp_path / "config.json").write_text(json.dumps(settings | {"hidden_act": "gelu", "num_attention_heads": 8}))
    convert(file, tmp_path / "neighbour")
    assert file_contents(tmp_path / "neighbour") == file_contents(tmp_path / "single")
    for source in (file, published / "image_encoder"):
        with pytest.raises(ImvarError, match=r"config\.json: expected the config of the image_encoder, got that of a "):
            convert(source, tmp_path / "named", config=tmp_path)
    assert not (tmp_path / "named").exists()


def test_a_folder_whose_parts_are_all_disabled(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text('{"unet": [null, null]}')
    with pytest.raises(CheckpointError, match="expected a part of a checkpoint, got none"):
        convert(tmp_path, tmp_path / "out")
