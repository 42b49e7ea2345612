"""Options of loading and saving: a wrong type or value is an error that names the option, and nothing is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import imvar
from imvar import CheckpointError, InputError, StableDiffusionImageVariationPipeline, UNet2DConditionModel
from imvar.conversion import convert
from tests.support.random_checkpoint import tiny_pipeline

PIPELINE = StableDiffusionImageVariationPipeline


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("dtype", False),
        ("dtype", 0),
        ("dtype", []),
        ("dtype", np.zeros(2)),
        ("dtype", "float8_e4m3fn"),
        ("torch_dtype", torch.float8_e4m3fn),
        ("torch_dtype", {"unet": torch.int8}),
        ("torch_dtype", {3: torch.float16}),
        ("variant", 0),
        ("variant", []),
        ("variant", np.zeros(2)),
        ("use_safetensors", 1),
        ("use_safetensors", np.zeros(2)),
        ("revision", 3),
        ("cache_dir", 3),
        ("local_files_only", "no"),
        ("token", 3),
        ("low_cpu_mem_usage", "no"),
        ("disable_mmap", 1),
        ("compile", 1),
        ("requires_safety_checker", "no"),
        ("requires_safety_checker", float("nan")),
    ],
)
def test_options_of_a_pipeline(checkpoint, option, wrong):
    with pytest.raises(InputError, match="dtype" if "dtype" in option else option):
        PIPELINE.from_pretrained(checkpoint, **{option: wrong})


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("dtype", False),
        ("variant", 0),
        ("use_safetensors", 0),
        ("subfolder", 1),
        ("subfolder", np.zeros(2)),
        ("local_files_only", 1),
        ("low_cpu_mem_usage", 0),
        ("disable_mmap", 0),
        ("revision", b"main"),
    ],
)
def test_options_of_a_part(checkpoint, option, wrong):
    with pytest.raises(InputError, match=option):
        UNet2DConditionModel.from_pretrained(checkpoint, **({"subfolder": "unet"} | {option: wrong}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"proxies": {"https": "x"}}, "proxies: expected None, .*HTTPS_PROXY"),
        ({"device_map": "balanced"}, r"device_map: expected None, got 'balanced'; call \.to\(device\) .*cpu_offload"),
        ({"custom_pipeline": "x"}, "custom_pipeline: expected None, got 'x'; call from_pretrained of your subclass"),
        ({"token": "hf_secret", "use_auth_token": "hf_other"}, "use_auth_token: expected None, as token is given"),
        ({"use_auth_token": 3}, "token: expected a string or True or False, got 3"),
        ({"force_download": "yes"}, "force_download: expected True or False, got 'yes'"),
        ({"force_download": True, "local_files_only": True}, "force_download: expected False with local_files_only"),
    ],
)
def test_options_that_diffusers_ignores_or_cannot_combine(checkpoint, options, words):
    file = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    for load in (
        lambda **o: PIPELINE.from_pretrained(checkpoint, **o),
        lambda **o: UNet2DConditionModel.from_pretrained(checkpoint, "unet", **o),
        lambda **o: UNet2DConditionModel.from_single_file(file, config=checkpoint, **o),
        lambda **o: imvar.PNDMScheduler.from_pretrained(checkpoint, "scheduler", **o),
        lambda **o: imvar.CLIPImageProcessor.from_pretrained(checkpoint, "feature_extractor", **o),
        lambda **o: UNet2DConditionModel.load_config(checkpoint, subfolder="unet", **o),
    ):
        with pytest.raises(InputError, match=words) as caught:
            load(**options)
        assert "hf_" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"extract_ema": "no"}, "extract_ema: expected True or False, got 'no'"),
        ({"extract_ema": 0}, "extract_ema: expected True or False, got 0"),
        ({"ema": "maybe"}, "maybe"),
        ({"subfolder": "unet"}, "subfolder: expected None without config="),
        ({"subfolder": 3}, "subfolder: expected a string, got 3"),
        ({"config": "a" * 5000}, "a" * 50),
        ({"dtype": 0}, "dtype: expected .*, got 0"),
        ({"disable_mmap": 1}, "disable_mmap: expected True or False, got 1"),
    ],
)
def test_options_of_a_single_file(checkpoint, options, words):
    file = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises((InputError, CheckpointError), match=words):
        UNet2DConditionModel.from_single_file(file, **options)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(16).to_sparse(), torch.zeros(16, device="meta"), torch.nested.nested_tensor([torch.zeros(2)])],
    ids=["sparse", "meta", "nested"],
)
def test_tensors_in_memory_without_values(checkpoint, tensor):
    unet = UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet")
    tensors = unet.keymap.to_file(unet.state_dict())
    with pytest.raises(InputError, match=r"conv_in\.bias: expected a .*tensor"):
        UNet2DConditionModel.from_single_file(tensors | {"conv_in.bias": tensor}, config=checkpoint)


@pytest.mark.parametrize(
    ("option", "wrong"),
    [("safe_serialization", "no"), ("safe_serialization", []), ("is_main_process", "no"), ("variant", 3)],
)
def test_options_of_saving(folder, option, wrong):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    pipe = tiny_pipeline()
    with pytest.raises(InputError, match=option):
        pipe.unet.save_pretrained(folder / "unet", **{option: wrong})
    if option != "is_main_process":
        with pytest.raises(InputError, match=option):
            pipe.save_pretrained(folder, **{option: wrong})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}, torch.ones(1, dtype=torch.complex64), 1j])
def test_config_values_that_cannot_be_saved(folder, value):
    pipe, before = tiny_pipeline(), (folder / "unet" / "config.json").read_bytes()
    pipe.unet.register_to_config(foo=value)
    with pytest.raises(InputError, match="foo"):
        pipe.save_pretrained(folder)
    assert (folder / "unet" / "config.json").read_bytes() == before
    pipe = tiny_pipeline()
    pipe.register_to_config(foo=value)
    with pytest.raises(InputError, match="foo"):
        pipe.save_pretrained(folder)
    assert (folder / "unet" / "config.json").read_bytes() == before


def test_a_component_in_the_place_of_another(folder):
    pipe, before = tiny_pipeline(), (folder / "unet" / "config.json").read_bytes()
    pipe.unet = pipe.vae
    with pytest.raises(InputError, match="unet: expected a component for unet, got AutoencoderKL, which is for vae"):
        pipe.save_pretrained(folder)
    assert (folder / "unet" / "config.json").read_bytes() == before


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_unknown_config_fields_are_warned_about(folder):
    edit(folder / "unet" / "config.json", norm_esp=1e-3)
    with pytest.warns(UserWarning, match=r"unet/config\.json: UNet2DConditionModel has no config fields 'norm_esp'"):
        PIPELINE.from_pretrained(folder)


def test_the_config_of_another_part(folder):
    edit(folder / "unet" / "config.json", _class_name="AutoencoderKL")
    with pytest.raises(CheckpointError, match="a class of the unet, got 'AutoencoderKL', of the vae") as caught:
        PIPELINE.from_pretrained(folder)
    assert (caught.value.path, caught.value.key) == (folder / "unet" / "config.json", "_class_name")


@pytest.mark.parametrize(
    ("unet", "words"),
    [
        (None, "an empty entry; pass from_pretrained(..., unet=...)"),
        ([None, None], "an empty entry; pass from_pretrained(..., unet=...)"),
        (["os", "UNet2DConditionModel"], "got 'os'"),
        (["", "UNet2DConditionModel"], "got ''"),
    ],
)
def test_an_index_without_a_part(folder, unet, words):
    edit(folder / "model_index.json", unet=unet)
    with pytest.raises(CheckpointError) as caught:
        PIPELINE.from_pretrained(folder)
    assert words in str(caught.value)
    assert (caught.value.path, caught.value.key) == (folder / "model_index.json", "unet")
    if unet is None:
        part = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        assert PIPELINE.from_pretrained(folder, unet=part).unet is part


@pytest.mark.parametrize("setting", [{"do_pad": True}, {"default_to_square": True}])
def test_unsupported_image_processor_fields(folder, setting):
    edit(folder / "feature_extractor" / "preprocessor_config.json", **setting)
    with pytest.raises(CheckpointError, match=next(iter(setting))):
        PIPELINE.from_pretrained(folder)
    edit(folder / "feature_extractor" / "preprocessor_config.json", **dict.fromkeys(setting, False))
    PIPELINE.from_pretrained(folder)


def test_control_characters_in_names_are_escaped(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"evil\n\x1b[31mimvar: all fine\x07" + "x" * 3000: torch.zeros(1)}, path)
    with pytest.raises(CheckpointError) as caught:
        PIPELINE.from_pretrained(folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2500


def test_a_web_page_in_the_place_of_a_config(folder):
    (folder / "unet" / "config.json").write_text("\n<!DOCTYPE html><html>not found</html>")
    with pytest.raises(CheckpointError, match="got a web page"):
        PIPELINE.from_pretrained(folder)


def test_a_link_that_leads_back_to_itself(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    with pytest.raises(CheckpointError, match="expected a folder, got a circular link") as caught:
        tiny_pipeline().save_pretrained(loop)
    assert "in place" not in str(caught.value)
    assert os.listdir(tmp_path) == ["loop"]


def test_trailing_bytes_after_the_tensors(folder):
    pipe = tiny_pipeline()
    pipe.unet.save_pretrained(folder / "unet", safe_serialization=False)
    path = folder / "unet" / "diffusion_pytorch_model.bin"
    path.write_bytes(path.read_bytes() + bytes(10))
    with pytest.raises(CheckpointError, match="no end record") as caught:
        UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=False)
    assert caught.value.path == path


def test_an_empty_name():
    with pytest.raises(CheckpointError, match="got an empty string"):
        PIPELINE.from_pretrained("")


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="expected a folder, got a file") as caught:
        tiny_pipeline().save_pretrained(tmp_path / "file")
    assert caught.value.path == tmp_path / "file"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_without_write_permission(folder, monkeypatch):
    monkeypatch.setattr("imvar.atomic.folder.is_writable", lambda path: False)
    with pytest.raises(CheckpointError, match="no permission") as caught:
        tiny_pipeline().save_pretrained(folder)
    assert caught.value.path == folder


class ThirdPartyChecker:
    """A third-party component whose errors have their own paths."""

    def __init__(self, path):
        self.path = path

    def __call__(self, images, clip_input):
        return images, [False] * len(images)

    def save_pretrained(self, folder, **options):
        raise CheckpointError("is full", path=self.path)


@pytest.mark.parametrize("path", [None, "/elsewhere/weights"])
def test_errors_of_third_party_components(tmp_path, path):
    pipe = tiny_pipeline()
    pipe.safety_checker = ThirdPartyChecker(path)
    with pytest.raises(CheckpointError, match="is full") as caught:
        pipe.save_pretrained(tmp_path / "new")
    assert caught.value.path == (None if path is None else Path(path))
    assert not (tmp_path / "new").exists()
    pipe.safety_checker = lambda images, clip_input: (images, [False] * len(images))
    with pytest.raises(InputError, match="safety_checker: expected a component with save_pretrained, got function"):
        pipe.save_pretrained(tmp_path / "new")


def test_errors_of_overrides_are_the_callers(checkpoint):
    """An invalid override is an error of the caller, not of the checkpoint."""
    with pytest.raises(InputError, match="unet: expected a UNet2DConditionModel, got AutoencoderKL") as caught:
        PIPELINE.from_pretrained(checkpoint, unet=tiny_pipeline().vae)
    assert not isinstance(caught.value, CheckpointError)


def test_options_of_convert(checkpoint, tmp_path):
    for option in ("to", "dtype", "part"):
        for wrong in ("foo", 3, []):
            with pytest.raises(InputError, match=f"{option}: expected"):
                convert(checkpoint, tmp_path / "new", **{option: wrong})
    with pytest.raises(CheckpointError, match="nothing: expected a file or folder, got nothing at this path"):
        convert(checkpoint, tmp_path / "new", fill=tmp_path / "nothing")
    assert not os.listdir(tmp_path)


def test_two_encoders_in_one_file(checkpoint):
    encoder = imvar.CLIPVisionModelWithProjection.from_pretrained(checkpoint, subfolder="image_encoder")
    tensors = encoder.keymap.to_file(encoder.state_dict())
    both = {f"cond_stage_model.{name}.{key}": t for name in ("transformer", "model") for key, t in tensors.items()}
    with pytest.raises(CheckpointError, match="expected one image_encoder, got 2"):
        imvar.CLIPVisionModelWithProjection.from_single_file(both, config=checkpoint)


@pytest.mark.parametrize(
    ("safe", "name", "kind"),
    [
        (True, "diffusion_pytorch_model.bin", "got safetensors in a file that ends in .bin"),
        (False, "diffusion_pytorch_model.safetensors", "got a pickle in a file that ends in .safetensors"),
    ],
)
def test_a_file_of_another_format_than_its_ending(tmp_path, safe, name, kind):
    tiny_pipeline().unet.save_pretrained(tmp_path, safe_serialization=safe)
    file = next(path for path in tmp_path.iterdir() if path.suffix != ".json")
    file.rename(tmp_path / name)
    with pytest.raises(CheckpointError) as caught:
        UNet2DConditionModel.from_pretrained(tmp_path)
    assert kind in str(caught.value)
    assert caught.value.path == tmp_path / name


def test_only_the_main_process_writes(tmp_path):
    pipe = tiny_pipeline()
    for part in pipe, pipe.unet, pipe.scheduler, pipe.feature_extractor:
        part.save_pretrained(tmp_path / "none", is_main_process=False)
        assert not (tmp_path / "none").exists()
        part.save_pretrained(tmp_path / type(part).__name__, is_main_process=True)
        assert list((tmp_path / type(part).__name__).iterdir())
        with pytest.raises(imvar.InputTypeError, match="is_main_process: expected True or False, got 'no'"):
            part.save_pretrained(tmp_path / "none", is_main_process="no")
