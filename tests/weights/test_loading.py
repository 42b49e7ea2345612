"""Loading from folders and hub repositories, in every format and naming, and the errors."""

import copy
import json
import mmap
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import imvar
from imvar import CheckpointError, StableDiffusionImageVariationPipeline
from imvar.weights.mapped import MappedFiles
from tests.support.random_checkpoint import TINY_ENCODER, TINY_UNET, tiny_pipeline

PARTS = ["vae", "unet", "image_encoder", "safety_checker"]
CLASSES = {
    "vae": imvar.AutoencoderKL,
    "unet": imvar.UNet2DConditionModel,
    "image_encoder": imvar.CLIPVisionModelWithProjection,
    "safety_checker": imvar.StableDiffusionSafetyChecker,
}


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of the checkpoint that a test may modify."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def weights(folder, part):
    return next((folder / part).glob("*.safetensors"))


def rewrite(file, change):
    """Load a weights file, let `change` modify the dictionary, and write it back."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def equal(a, b):
    return a.state_dict().keys() == b.state_dict().keys() and all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"safe_serialization": False},
        {"variant": "fp16"},
        {"max_shard_size": "20KB"},
        {"safe_serialization": False, "max_shard_size": "20KB", "variant": "x"},
    ],
    ids=str,
)
def test_save_and_load(checkpoint, tmp_path, part, options):
    model = CLASSES[part].from_pretrained(checkpoint, subfolder=part)
    model.save_pretrained(tmp_path, **options)
    again = CLASSES[part].from_pretrained(tmp_path, variant=options.get("variant"))
    assert equal(model, again)
    assert dict(again.config) == dict(model.config)
    assert not again.training


def test_saving_again_replaces_older_files(checkpoint, tmp_path):
    """Shards of an older save would otherwise take precedence over the new file; a mapped file stays readable."""
    model = imvar.UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("*-of-*"))
    assert len(shards) > 1
    model = imvar.UNet2DConditionModel.from_pretrained(tmp_path)
    with torch.no_grad():
        model.conv_in.weight += 1
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    again = imvar.UNet2DConditionModel.from_pretrained(tmp_path)
    assert equal(again, model)
    again.save_pretrained(tmp_path)
    assert equal(again, model)


def test_precedence_of_formats(checkpoint, tmp_path):
    model = imvar.AutoencoderKL.from_pretrained(checkpoint, subfolder="vae")
    model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors"):
        imvar.AutoencoderKL.from_pretrained(tmp_path, use_safetensors=True)
    model.quant_conv.bias.data += 1
    model.save_pretrained(tmp_path)
    assert equal(imvar.AutoencoderKL.from_pretrained(tmp_path), model)
    assert not equal(imvar.AutoencoderKL.from_pretrained(tmp_path, use_safetensors=False), model)


@pytest.mark.parametrize(
    ("part", "renamed"),
    [
        ("vae", {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}),
        ("safety_checker", {"vision_model.": "vision_model.vision_model."}),
    ],
)
def test_tensor_names_of_2022(folder, part, renamed):
    before = CLASSES[part].from_pretrained(folder, subfolder=part)

    def rename(tensors):
        for name in list(tensors):
            new = name
            for old, older in renamed.items():
                new = new.replace(old, older)
            tensors[new] = tensors.pop(name)
        prefix = "vision_model." * 2
        if part == "safety_checker":
            tensors[f"{prefix}embeddings.position_ids"] = torch.arange(17)[None]

    rewrite(weights(folder, part), rename)
    assert equal(CLASSES[part].from_pretrained(folder, subfolder=part), before)


def test_a_whole_clip_model_as_image_encoder(folder):
    """The first revisions have a full CLIPModel, whose text tower is ignored, and another pipeline class."""
    before = imvar.CLIPVisionModelWithProjection.from_pretrained(folder, subfolder="image_encoder")
    rewrite(
        weights(folder, "image_encoder"),
        lambda tensors: tensors.update(
            {
                "text_model.embeddings.position_ids": torch.arange(7)[None],
                "text_model.final.weight": torch.ones(3),
                "vision_model.embeddings.position_ids": torch.arange(17)[None],
                "logit_scale": torch.ones(()),
                "text_projection.weight": torch.ones(2, 2),
            }
        ),
    )
    path = folder / "image_encoder" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps(
            {
                "model_type": "clip",
                "projection_dim": config.pop("projection_dim"),
                "vision_config": config,
                "text_config": {},
            }
        )
    )
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "image_encoder": ["transformers", "CLIPModel"],
        "_class_name": "StableDiffusionImageEmbedPipeline",
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    assert equal(StableDiffusionImageVariationPipeline.from_pretrained(folder).image_encoder, before)


def test_state_dicts_in_either_naming(pipe):
    for part in PARTS:
        model, other = getattr(pipe, part), getattr(tiny_pipeline(seed=9), part)
        assert not equal(model, other)
        model.load_state_dict(other.keymap.to_file(other.state_dict()))
        assert equal(model, other)
        model.load_state_dict(tiny := getattr(tiny_pipeline(seed=3), part).state_dict())
        assert torch.equal(next(iter(model.state_dict().values())), next(iter(tiny.values())))
        imvar.weights.load(model, other.keymap.to_file(other.state_dict()))
        assert equal(model, other)
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict({})


# Errors


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(sorted(t)[3]), "1 tensor missing"),
        (lambda t: t.update(extra=torch.ones(2)), "1 unknown tensor: extra"),
        (lambda t: t.update({sorted(t)[3]: torch.ones(1, 2, 3)}), r"by the config, got \(1, 2, 3\)"),
        (lambda t: t.clear(), "tensors missing"),
        (lambda t: t.update({sorted(t)[3]: t[sorted(t)[3]].to(torch.int8)}), "int8"),
    ],
)
def test_mismatched_tensors(folder, part, change, words):
    file = weights(folder, part)
    rewrite(file, change)
    with pytest.raises(CheckpointError, match=words) as caught:
        CLASSES[part].from_pretrained(folder, subfolder=part)
    assert caught.value.path == file
    assert caught.value.key
    assert str(file) in str(caught.value)
    assert isinstance(caught.value, OSError)


def test_a_tensor_under_two_names(folder):
    name = "encoder.mid_block.attentions.0.to_q.weight"
    rewrite(weights(folder, "vae"), lambda t: t.update({name.replace("to_q", "query"): t[name].clone()}))
    with pytest.raises(CheckpointError, match="expected one spelling of each tensor") as caught:
        imvar.AutoencoderKL.from_pretrained(folder, subfolder="vae")
    assert name in caught.value.key


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "got an empty file"),
        (b"<html>not found</html>", "got a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "got a git-lfs pointer"),
        (b"\xff" * 4096, "begin as such|not a pickle"),
        (
            b"PK\x06\x07" + bytes(12) + b"\2\0\0\0" + b"PK\x05\x06" + bytes(18),
            "begin as such|cut short",
        ),  # a multi-disk zip
    ],
)
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
def test_files_without_tensors(folder, name, content, words):
    weights(folder, "unet").unlink()
    (folder / "unet" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        imvar.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    assert caught.value.path == folder / "unet" / name


class Harmful:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_pickles_run_no_code(folder, capsys):
    file = folder / "unet" / "diffusion_pytorch_model.bin"
    weights(folder, "unet").unlink()
    for content, words in (
        ({"conv_in.weight": Harmful()}, "references builtins.print"),
        ([torch.ones(1)], "list"),
        ({"conv_in.weight": 3}, "dense"),
        ({"conv_in.weight": torch.eye(2).to_sparse()}, "dense"),
    ):
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=words) as caught:
            imvar.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        assert "weights_only=False" not in str(caught.value)
    assert "never" not in capsys.readouterr().out


def test_legacy_pickles_are_read(folder):
    before = imvar.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    file = weights(folder, "unet")
    torch.save(load_file(file), folder / "unet" / "diffusion_pytorch_model.bin", _use_new_zipfile_serialization=False)
    file.unlink()
    assert equal(imvar.UNet2DConditionModel.from_pretrained(folder, subfolder="unet"), before)


@pytest.mark.parametrize("place", ["../unet/x.safetensors", "/etc/passwd", "", ".."])
def test_indexes_with_paths_outside_the_folder(folder, place):
    weights(folder, "unet").unlink()
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": place}}))
    with pytest.raises(CheckpointError, match="expected a weights file next to the index"):
        imvar.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    index.write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(CheckpointError, match="weight_map"):
        imvar.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


@pytest.mark.parametrize(
    ("part", "setting", "value"),
    [
        ("unet", "act_fn", "gelu"),
        ("unet", "use_linear_projection", True),
        ("unet", "down_block_types", ["No", "No"]),
        ("unet", "class_embed_type", "timestep"),
        ("unet", "attention_head_dim", 3),
        ("unet", "norm_num_groups", 5),
        ("unet", "dual_cross_attention", True),
        ("unet", "num_class_embeds", 10),
        ("unet", "conv_in_kernel", 5),
        ("vae", "mid_block_add_attention", False),
        ("vae", "up_block_types", ["UpDecoderBlock2D"]),
        ("vae", "use_quant_conv", False),
        ("vae", "latents_mean", [0.5]),
        ("image_encoder", "hidden_act", "relu"),
        ("image_encoder", "attention_dropout", 0.1),
        ("image_encoder", "num_attention_heads", 5),
        ("scheduler", "beta_schedule", "sigmoid"),
        ("scheduler", "prediction_type", "sample"),
        ("scheduler", "timestep_spacing", "even"),
    ],
)
def test_unsupported_config_values(folder, part, setting, value):
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    file = folder / part / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
    with pytest.raises(CheckpointError, match=setting.split("_types")[0]) as caught:
        StableDiffusionImageVariationPipeline.from_pretrained(folder)
    assert caught.value.path == file


def test_model_index(folder):
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    for key, entry, words in (
        ("scheduler", ["diffusers", "HeunDiscreteScheduler"], "scheduler=..."),
        ("unet", ["os", "system"], "UNet2DConditionModel"),
        ("vae", [], "AutoencoderKL"),
    ):
        path.write_text(json.dumps(index | {key: entry}))
        with pytest.raises(CheckpointError, match=words) as caught:
            StableDiffusionImageVariationPipeline.from_pretrained(folder)
        assert caught.value.key == key
    path.write_text(
        json.dumps(
            index
            | {
                "controlnet": ["diffusers", "ControlNetModel"],
                "tokenizer": [None, None],
                "force_zeros_for_empty_prompt": True,
            }
        )
    )
    with pytest.warns(UserWarning, match=r": controlnet, force_zeros_for_empty_prompt: ignored"):
        StableDiffusionImageVariationPipeline.from_pretrained(folder)
    path.write_text(json.dumps(index | {"safety_checker": [None, None], "requires_safety_checker": False}))
    assert StableDiffusionImageVariationPipeline.from_pretrained(folder).safety_checker is None
    for invalid_json in ("{", "[]", '{"a": ' * 10_000):
        path.write_text(invalid_json)
        with pytest.raises(CheckpointError, match=r"JSON|no such file"):
            StableDiffusionImageVariationPipeline.from_pretrained(folder)


def test_overrides(checkpoint):
    scheduler = imvar.DDIMScheduler()
    parts = {"scheduler": scheduler, "safety_checker": None}
    with pytest.warns(UserWarning, match="safety_checker"):
        pipe = StableDiffusionImageVariationPipeline.from_pretrained(checkpoint, **parts)
    assert pipe.scheduler is scheduler
    assert pipe.safety_checker is None
    with pytest.raises(TypeError, match="tokenizer"):
        StableDiffusionImageVariationPipeline.from_pretrained(checkpoint, tokenizer="openai/clip")
    StableDiffusionImageVariationPipeline.from_pretrained(checkpoint, device_map=None, force_download=False)
    imvar.UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet", device_map=None, force_download=False)
    ddim = imvar.DDIMScheduler.from_pretrained(checkpoint, subfolder="scheduler", clip_sample=False)
    assert (ddim.config.clip_sample, ddim.config.steps_offset, ddim.config.skip_prk_steps) == (False, 1, True)
    with pytest.raises(TypeError, match="nonsense"):
        imvar.UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet", nonsense=1)


def test_a_subclass_that_forwards_its_arguments(checkpoint):
    class Mine(StableDiffusionImageVariationPipeline):
        def __init__(self, *args, strength=0.5, **kwargs):
            super().__init__(*args, **kwargs)
            self.strength = strength

    mine = Mine.from_pretrained(checkpoint, strength=0.7, requires_safety_checker=False, safety_checker=None)
    assert (mine.strength, mine.safety_checker, mine.unet.dtype) == (0.7, None, torch.float32)
    with pytest.raises(TypeError, match="weakness"):
        Mine.from_pretrained(checkpoint, weakness=1)


def test_dtypes(checkpoint, tmp_path):
    pipe = StableDiffusionImageVariationPipeline.from_pretrained(checkpoint, torch_dtype=torch.float16)
    assert {part: model.dtype for part, model in pipe.modules.items()} == dict.fromkeys(PARTS, torch.float16) | {}
    pipe.save_pretrained(tmp_path)
    assert StableDiffusionImageVariationPipeline.from_pretrained(tmp_path).dtype == torch.float32
    by_file = StableDiffusionImageVariationPipeline.from_pretrained(tmp_path, torch_dtype="auto")
    assert {model.dtype for model in by_file.modules.values()} == {torch.float16}
    mixed = StableDiffusionImageVariationPipeline.from_pretrained(
        tmp_path, dtype={"unet": "bfloat16", "default": torch.float32}
    )
    assert (mixed.unet.dtype, mixed.vae.dtype) == (torch.bfloat16, torch.float32)
    for bad in ({"text_encoder": torch.float16}, "int8", torch.int64, 16):
        with pytest.raises(TypeError, match="dtype"):
            StableDiffusionImageVariationPipeline.from_pretrained(checkpoint, dtype=bad)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float16, 1e6), (torch.float16, -65520.0), (torch.bfloat16, 3.4e38)],
    ids=["float16", "rounded", "bfloat16"],
)
def test_values_beyond_the_dtype_are_refused(folder, dtype, value, tmp_path):
    """Loading never turns a number into infinity."""
    file, key = weights(folder, "unet"), "down_blocks.0.attentions.0.proj_in.weight"

    def put(tensors):
        tensors[key][0, 0] = value
        tensors[key][1, 0] = float("nan")

    rewrite(file, put)
    single = shutil.copy(file, tmp_path / "single")
    pickled = tmp_path / "single.ckpt"
    torch.save(load_file(file), pickled)
    unet = imvar.UNet2DConditionModel
    for load, path in (
        (lambda **dtype: StableDiffusionImageVariationPipeline.from_pretrained(folder, **dtype), file),
        (lambda **dtype: unet.from_pretrained(folder, subfolder="unet", **dtype), file),
        (lambda **dtype: unet.from_single_file(single, config=folder, **dtype), single),
        (lambda **dtype: unet.from_single_file(pickled, config=folder, **dtype), pickled),
    ):
        words = f"expected values that {dtype} can hold, got {value:g}; load with torch.float32"
        with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
            load(torch_dtype=dtype)
        assert (caught.value.path, caught.value.key) == (path, key)
        load(dtype="auto")


def test_values_below_the_limit_and_values_that_were_infinite_before_are_loaded(folder):
    key = "conv_in.weight"

    def put(tensors):
        tensors[key].view(-1)[:5] = torch.tensor([65519.0, -65519.0, float("inf"), float("-inf"), float("nan")])

    rewrite(weights(folder, "unet"), put)
    unet = imvar.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=torch.float16)
    assert str(unet.conv_in.weight.view(-1)[:5].tolist()) == "[65504.0, -65504.0, inf, -inf, nan]"


PEAK = """
def peak():  # not ru_maxrss, which includes the parent process
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_cast_to_half_precision_takes_no_second_copy(tmp_path):
    """The check of the values needs no memory beyond the loaded weights and the mapped file."""
    code = """
import torch
from imvar.weights.pretrained import cast
tensor = torch.ones(2**24)
torch.ones(2**20).half().aminmax()
before = peak()
cast(tensor, torch.float16, None, "a")
print(peak() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", PEAK + code], capture_output=True, text=True, check=True).stdout)
    assert grown < 1.3 * 2**25  # of which 2**25 are the result


@pytest.mark.skipif(sys.platform != "linux", reason="pages are returned on Linux only")
@pytest.mark.parametrize("options", [{}, {"safe_serialization": False}, {"max_shard_size": "20MB"}], ids=str)
def test_a_mapped_file_that_is_cast_does_not_stay_in_memory(options, checkpoint, tmp_path):
    wide = {**TINY_ENCODER, "intermediate_size": 2**17, "hidden_size": 32, "num_hidden_layers": 4}
    encoder = imvar.CLIPVisionModelWithProjection(**wide)
    encoder.save_pretrained(tmp_path, **options)
    size = sum(p.nbytes for p in encoder.parameters())
    code = """
import sys, torch
from imvar import CLIPVisionModelWithProjection as Encoder
Encoder.from_pretrained(sys.argv[1], "image_encoder", torch_dtype=torch.bfloat16)
before = peak()
encoder = Encoder.from_pretrained(sys.argv[2], torch_dtype=torch.bfloat16)
print(peak() - before)
torch.save({name: p.double().sum() for name, p in encoder.named_parameters()}, sys.argv[3])
"""
    command = [sys.executable, "-c", PEAK + code, checkpoint, tmp_path, tmp_path / "sums.pt"]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 0.8 * size  # half are the weights in bfloat16, a quarter the largest layer of the file
    sums = torch.load(tmp_path / "sums.pt")
    assert sums == {name: p.bfloat16().double().sum() for name, p in encoder.named_parameters()}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mapped_files_are_found_beside_names_that_are_not_utf8(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    file = folder / "weights"
    file.write_bytes(bytes(5000))
    assert not MappedFiles([file]).ranges
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ):
        assert MappedFiles([file]).ranges


@pytest.mark.parametrize("stored", ["float8_e4m3fn", "float8_e5m2", "both", "with float16", "with float32"])
def test_the_automatic_dtype_of_8_bit_files_is_one_that_layers_compute_in(folder, stored, photo):
    """8-bit floats are a storage format: the weights are computed with in a wider dtype that holds each exactly."""

    def narrow(tensors):
        for i, (name, tensor) in enumerate(tensors.items()):
            kinds = ["float8_e4m3fn", "float8_e5m2"] if stored == "both" else [stored]
            if stored.startswith("with"):
                kinds = ["float8_e4m3fn", stored.split()[1]]
            tensors[name] = tensor.to(getattr(torch, kinds[i % len(kinds)]))

    rewrite(weights(folder, "unet"), narrow)
    rewrite(weights(folder, "vae"), narrow)
    expected = {"with float16": torch.float16, "with float32": torch.float32}.get(stored, torch.bfloat16)
    pipe = StableDiffusionImageVariationPipeline.from_pretrained(folder, torch_dtype="auto")
    assert (pipe.unet.dtype, pipe.vae.dtype, pipe.image_encoder.dtype) == (expected, expected, torch.float32)
    for part, model in (("unet", imvar.UNet2DConditionModel), ("vae", imvar.AutoencoderKL)):
        one = model.from_pretrained(folder, subfolder=part, dtype="auto")
        single = model.from_single_file(weights(folder, part), dtype="auto")
        exact = model.from_pretrained(folder, subfolder=part)
        assert equal(one, getattr(pipe, part))
        assert equal(single, one)
        assert equal(exact, one.float())
    pipe.set_progress_bar_config(disable=True)
    assert pipe(photo, num_inference_steps=1, guidance_scale=1, seed=0).images[0].size == (128, 128)


CHANGE_LOADED_FILES = """
import pathlib, sys, torch
from imvar import StableDiffusionImageVariationPipeline as Pipeline, UNet2DConditionModel as UNet

latents = torch.ones(1, 4, 8, 8)
for source in map(pathlib.Path, sys.argv[2:]):
    single = source.is_file()
    if sys.argv[1] == "pipeline":
        load = Pipeline.from_single_file if single else Pipeline.from_pretrained
        unet = load(source, disable_mmap=True, safety_checker=None, requires_safety_checker=False).unet
    else:
        load = UNet.from_single_file if single else UNet.from_pretrained
        unet = load(source, disable_mmap=True) if single else load(source, subfolder="unet", disable_mmap=True)
    files = [source] if single else [path for path in (source / "unet").iterdir() if path.suffix != ".json"]
    with torch.no_grad():
        context = torch.ones(1, 1, unet.config.cross_attention_dim)
        before = unet(latents, 1, context).sample
        for change in (lambda file: file.write(b"\\xff" * 10**5), lambda file: file.truncate(100)):
            for path in files:
                with path.open("r+b") as file:
                    change(file)
            assert torch.equal(unet(latents, 1, context).sample, before), source
    print(source.name)
"""


@pytest.mark.parametrize("kind", ["pipeline", "model"])
@pytest.mark.filterwarnings("ignore")
def test_without_memory_mapping_a_changed_file_changes_nothing(kind, checkpoint, small, originals, tmp_path):
    """With `disable_mmap=True` weights are a copy: the file may be rewritten or cut short while they are used."""
    pipe = StableDiffusionImageVariationPipeline.from_pretrained(checkpoint)
    sources = {name: tmp_path / name for name in ("folder", "shards", "pickles", "ckpt", "safetensors")}
    pipe.save_pretrained(sources["folder"])
    pipe.save_pretrained(sources["shards"], max_shard_size="20KB")
    pipe.save_pretrained(sources["pickles"], safe_serialization=False)
    shutil.copy(originals["v2"], sources["ckpt"])
    shutil.copy(small, sources["safetensors"])
    command = [sys.executable, "-W", "ignore", "-c", CHANGE_LOADED_FILES, kind, *map(str, sources.values())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, list(sources)), done.stderr


def test_a_variant_of_some_parts_only(checkpoint, folder):
    unet = imvar.UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet")
    unet.conv_in.weight.data.zero_()
    unet.save_pretrained(folder / "unet", variant="fp16")
    assert equal(StableDiffusionImageVariationPipeline.from_pretrained(folder, variant="fp16").unet, unet)
    assert not equal(StableDiffusionImageVariationPipeline.from_pretrained(folder).unet, unet)
    with pytest.raises(CheckpointError, match=r"variant='fp32'"):
        StableDiffusionImageVariationPipeline.from_pretrained(folder, variant="fp32")
    with pytest.raises(CheckpointError, match=r"fp32\.safetensors"):
        imvar.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", variant="fp32")


def test_a_missing_folder(tmp_path):
    for nowhere in (tmp_path / "nowhere", "nowhere", "a/b/c"):
        with pytest.raises(CheckpointError, match="no such folder"):
            StableDiffusionImageVariationPipeline.from_pretrained(nowhere)
    for bad in (None, 3, b"owner/name"):
        with pytest.raises(TypeError, match="pretrained_model_name_or_path"):
            StableDiffusionImageVariationPipeline.from_pretrained(bad)


# Constructors


def test_constructors_accept_keywords_positions_or_a_config():
    unet = imvar.UNet2DConditionModel(**TINY_UNET)
    for other in (
        imvar.UNet2DConditionModel(unet.config),
        imvar.UNet2DConditionModel.from_config(unet.config),
        imvar.UNet2DConditionModel.from_config(dict(unet.config), sample_size=16),
    ):
        assert dict(other.config) == dict(unet.config)
    assert unet.config.block_out_channels == unet.config["block_out_channels"] == (16, 32)
    assert imvar.DDIMScheduler(500, 0.01).config.num_train_timesteps == 500
    for bad, words in (({"widths": 3}, "widths"), ({"act_fn": "relu"}, "act_fn"), ({"norm_num_groups": 7}, "norm_num")):
        with pytest.raises(ValueError, match=words):
            imvar.UNet2DConditionModel(**bad)
    with pytest.raises(TypeError, match="register_to_config"):
        imvar.models.unet.UNetConfig()["sample_size"] = 3
    for vague in ({"upcast_attention": None}, {"only_cross_attention": [False, False]}, {"dropout": 0}):
        imvar.UNet2DConditionModel(**TINY_UNET, **vague)
    for per_level in ("layers_per_block", "transformer_layers_per_block", "cross_attention_dim"):
        with pytest.raises(imvar.InputError, match=per_level):
            imvar.UNet2DConditionModel(**(TINY_UNET | {per_level: [1, 2]}))


def test_configs_are_dictionaries(pipe):
    for part in pipe.components.values():
        config = part.config
        assert isinstance(config, dict)
        assert json.loads(json.dumps(config.to_dict())) == json.loads(config.to_json_string())
        assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config)) == copy.copy(config)
        assert all(getattr(config, key) is value for key, value in config.items() if key[0] != "_")
    assert imvar.CLIPVisionConfig(hidden_size=24)["hidden_size"] == 24
    config = imvar.CLIPVisionConfig(**TINY_ENCODER)
    for encoder in (
        imvar.CLIPVisionModelWithProjection(config),
        imvar.CLIPVisionModelWithProjection(config=config),
        imvar.CLIPVisionModelWithProjection(**TINY_ENCODER),
    ):
        assert encoder.config == config


def test_a_change_of_an_unknown_field(pipe):
    with pytest.warns(UserWarning, match="DDIMScheduler.from_config: .*solver_order"):
        ddim = imvar.DDIMScheduler.from_config(pipe.scheduler.config, solver_order=2)
    assert "solver_order" not in ddim.config


def test_published_names_in_a_wrapping_module(pipe):
    """As in the wrapper of a trainer."""
    wrapper = torch.nn.ModuleDict({"unet": pipe.unet, "extra": torch.nn.Linear(2, 2)})
    published_tensors = {
        f"unet.{name}": tensor + 1 for name, tensor in pipe.unet.keymap.to_file(pipe.unet.state_dict()).items()
    }
    kept = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    wrapper.load_state_dict(published_tensors | {f"extra.{k}": v for k, v in wrapper["extra"].state_dict().items()})
    assert all(torch.equal(tensor, kept[name] + 1) for name, tensor in pipe.unet.state_dict().items())
