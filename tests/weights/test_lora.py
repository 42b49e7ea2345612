"""Files of LoRA adapters: each format of diffusers, peft and kohya, and files that are refused."""

import copy
import json
import math
import warnings

import peft
import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from imvar import CheckpointError, InputError, UNet2DConditionModel
from tests.support.loopback_hub import environment, run, serve
from tests.support.lora import random_lora, random_unet, unet_of_diffusers
from tests.support.random_checkpoint import TINY_UNET, randomize
from tests.support.refusals import assert_refused

FILE = "pytorch_lora_weights.safetensors"
TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def unet():
    return random_unet()


@pytest.fixture
def theirs(unet):
    return unet_of_diffusers(unet)


def assert_same_weights(unet, expected):
    """Assert that adapters changed the weights as in a model of diffusers', whose adapters are merged here."""
    expected.fuse_lora()
    expected.unload_lora()
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(unet.state_dict()[name], weight, atol=1e-5, rtol=0)


def load_into_diffusers(theirs, tensors):
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(dict(tensors), unet_config=theirs.config)
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, theirs)


def kohya(unet, where="", alpha=1.0):
    """Return an adapter as kohya's scripts name it."""
    tensors = random_lora(unet, where=where, prefix="", halves=("lora_down", "lora_up"))
    renamed = {}
    for name, tensor in tensors.items():
        layer, half, _ = name.rsplit(".", 2)
        renamed[f"lora_unet_{layer.replace('.', '_')}.{half}.weight"] = tensor
        renamed[f"lora_unet_{layer.replace('.', '_')}.alpha"] = torch.tensor(alpha)
    return renamed


# ---- formats


@pytest.mark.parametrize("halves", [("lora.down", "lora.up"), ("lora_A", "lora_B")], ids=["down and up", "A and B"])
def test_names_of_diffusers(unet, theirs, halves):
    lora = random_lora(unet, halves=halves)
    unet.load_lora_adapter(lora)
    load_into_diffusers(theirs, lora)
    assert_same_weights(unet, theirs)


def test_names_of_attention_processors(unet, theirs):
    """The first format of diffusers, with and without "unet."."""
    lora = random_lora(unet, where="to_")
    old = {
        name.replace(".to_out.0.", ".to_out.").replace(".lora.", "_lora.").replace(".to_", ".processor.to_"): tensor
        for name, tensor in lora.items()
    }
    assert f"unet.{TO_Q.replace('to_q', 'processor.to_q_lora')}.down.weight" in old
    unet.load_lora_adapter(old)
    load_into_diffusers(theirs, old)
    assert_same_weights(unet, theirs)
    without_prefix = {name.removeprefix("unet."): tensor for name, tensor in old.items()}
    other = randomize(UNet2DConditionModel(**TINY_UNET), 2)
    other.load_lora_adapter(without_prefix)
    assert_same_weights(other, unet)


@pytest.mark.parametrize("where", ["attentions", ""], ids=["linear layers and 1x1", "3x3 convolutions too"])
def test_names_of_kohya(unet, theirs, where):
    lora = kohya(unet, where, alpha=2.0)
    unet.load_lora_adapter(lora)
    load_into_diffusers(theirs, lora)
    assert_same_weights(unet, theirs)


def test_original_names_with_underscores_or_dots(unet):
    """As for the original UNet, kohya's and those of ComfyUI."""
    expected = randomize(UNet2DConditionModel(**TINY_UNET), 2)
    expected.load_lora_adapter(random_lora(unet))
    from imvar.weights.keymap import Dialect, Naming

    def original(name, separator, prefix, halves):
        layer, half = name.removeprefix("unet.").removesuffix(".weight").split(".lora.")
        source = unet.keymap.sources(layer, Naming(Dialect.ORIGINAL))[0].name
        return f"{prefix}{source.replace('.', separator)}.{halves[half]}.weight"

    for separator, prefix, halves in [
        ("_", "lora_unet_", {"down": "lora_down", "up": "lora_up"}),
        (".", "diffusion_model.", {"down": "lora_A", "up": "lora_B"}),
    ]:
        unet.load_lora_adapter(
            {original(name, separator, prefix, halves): tensor for name, tensor in random_lora(unet).items()}
        )
        assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), expected.parameters(), strict=True))
        unet.unload_lora()


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_of_peft(unet, tmp_path, rslora):
    model = peft.get_peft_model(
        randomize(UNet2DConditionModel(**TINY_UNET), 2),
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["to_q", "to_out.0", "conv1"],
            alpha_pattern={"attn1.to_q": 1, "^mid_block.resnets.0.conv1": 3},
            rank_pattern={"conv1": 2},
            use_rslora=rslora,
            init_lora_weights=False,
        ),
    )
    model.save_pretrained(tmp_path)
    unet.load_lora_adapter(tmp_path)
    merged = model.merge_and_unload()
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(unet.state_dict()[name], weight, atol=1e-5, rtol=0)


def test_tensors_of_peft_without_their_config(unet, tmp_path, monkeypatch):
    model = peft.get_peft_model(
        randomize(UNet2DConditionModel(**TINY_UNET), 2),
        peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False),
    )
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 400}')  # of some other adapter
    monkeypatch.chdir(tmp_path)
    with pytest.warns(
        UserWarning, match=r"there is no adapter_config.json next to it, so alpha is assumed to equal the rank"
    ):
        unet.load_lora_adapter(get_peft_model_state_dict(model))
    merged = model.merge_and_unload()
    torch.testing.assert_close(unet.get_submodule(TO_Q).weight, merged.get_submodule(TO_Q).weight, atol=1e-5, rtol=0)


def test_conversions_by_diffusers(unet, theirs, tmp_path):
    """Training scripts convert with these functions before they save."""
    unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
    tensors = get_peft_model_state_dict(unet)
    unet.fuse_lora()
    unet.unload_lora()
    renamed = {f"unet.{name}": t for name, t in convert_state_dict_to_diffusers(tensors).items()}
    for_kohya = convert_state_dict_to_kohya({f"unet.{name}": t for name, t in tensors.items()})
    fresh = UNet2DConditionModel(**TINY_UNET)
    for lora in (tensors, renamed, for_kohya):
        fresh.load_state_dict(theirs.state_dict())
        fresh.load_lora_adapter(lora)
        for name, weight in unet.state_dict().items():
            torch.testing.assert_close(fresh.state_dict()[name], weight, atol=1e-5, rtol=0)
        fresh.fuse_lora()
        fresh.unload_lora()


def test_only_the_tensors_with_an_explicit_prefix(unet):
    lora = random_lora(unet, where="attn1", prefix="mine.") | {"other.lora_A.weight": torch.zeros(4, 4)}
    unet.load_lora_adapter(lora, prefix="mine")
    assert TO_Q in unet._adapters.originals


# ---- files and folders


def test_a_file_a_folder_or_a_repository(unet, tmp_path):
    lora = random_lora(unet, where="attn")
    expected = randomize(UNet2DConditionModel(**TINY_UNET), 2)
    expected.load_lora_adapter(lora)
    (tmp_path / "a" / "sub").mkdir(parents=True)
    save_file(lora, tmp_path / "a" / "style.safetensors")
    save_file(lora, tmp_path / "a" / "sub" / FILE)
    save_file(random_lora(unet, seed=1), tmp_path / "a" / "sub" / "another.safetensors")
    torch.save(lora, tmp_path / "lora.bin")
    for source, options in [
        (tmp_path / "a" / "style.safetensors", {}),
        (str(tmp_path / "a"), {}),
        (tmp_path / "a", {"weight_name": "style.safetensors"}),
        (tmp_path / "a", {"subfolder": "sub"}),
        (tmp_path / "lora.bin", {}),
        (lora, {}),
    ]:
        unet.load_lora_adapter(source, **options)
        assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), expected.parameters(), strict=True))
        unet.unload_lora()


def test_later_changes_of_a_file_or_of_tensors_do_not_matter(unet, tmp_path):
    lora = random_lora(unet, where="attn")
    save_file(lora, tmp_path / FILE)
    for source in (tmp_path, lora):
        unet.load_lora_adapter(source, adapter_name="a")
        expected = unet.get_submodule(TO_Q).weight.clone()
        unet.set_adapters("a", 0)
        if source is lora:
            lora[f"unet.{TO_Q}.lora.up.weight"].zero_()  # as a step of training does
        else:
            content = (tmp_path / FILE).read_bytes()
            (tmp_path / FILE).write_bytes(content[:-1000] + bytes(1000))
        unet.set_adapters("a", 1)
        assert torch.equal(unet.get_submodule(TO_Q).weight, expected)
        unet.unload_lora()


def test_safetensors_are_read_before_pickles(unet, tmp_path):
    save_file(random_lora(unet, where="attn"), tmp_path / "one.safetensors")
    torch.save({"optimizer": 1}, tmp_path / "other.bin")
    unet.load_lora_adapter(tmp_path)


def test_a_repository_on_the_hub(unet, tmp_path):
    files = tmp_path / "repository"
    (files / "sub").mkdir(parents=True)
    lora = random_lora(unet, where="attn", prefix="base_model.model.", halves=("lora_A", "lora_B"))
    save_file(lora, files / "adapter_model.safetensors")
    (files / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2}))
    save_file(lora, files / "sub" / "style.safetensors", metadata={"title": "another file"})
    unet.save_pretrained(tmp_path / "unet")
    code = f"""
import torch, imvar
unet = imvar.UNet2DConditionModel.from_pretrained({str(tmp_path / "unet")!r})
before = unet.get_submodule({TO_Q!r}).weight.clone()
change = lambda: (unet.get_submodule({TO_Q!r}).weight - before).norm().item()
unet.load_lora_adapter("owner/lora", token="secret")
print(change())
unet.unload_lora()
unet.load_lora_adapter("owner/lora", weight_name="style.safetensors", subfolder="sub", token="secret")
print(change())
unet.load_lora_adapter("owner/lora", local_files_only=True, hotswap=True, adapter_name="default_0")
print(change())
unet.load_lora_adapter("owner/lora", weight_name="missing.safetensors", token="secret")
"""
    with serve() as hub:
        hub.repositories["owner/lora"] = {"main": files}
        hub.tokens["owner/lora"] = "secret"
        done = run("-c", code, env=environment(hub.address, tmp_path / "home"), cwd=tmp_path)
    half, full, cached = map(float, done.stdout.split())
    assert half == cached == pytest.approx(full / 2)
    assert "CheckpointError: owner/lora: expected the file missing.safetensors, got a repository without" in done.stderr
    assert sorted(set(hub.fetched)) == [
        "owner/lora/adapter_config.json",
        "owner/lora/adapter_model.safetensors",
        "owner/lora/sub/style.safetensors",
    ]


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        ([], {}, "expected an adapter such as pytorch_lora_weights.safetensors, got none; pass weight_name="),
        (["a.safetensors", "b.safetensors"], {}, "got 2 other files: a.safetensors, b.safetensors; pass weight_name="),
        (["a.safetensors"], {"use_safetensors": False}, "got none"),
        (["a.safetensors"], {"weight_name": "../secret.safetensors"}, "expected a path in"),
        (["a.safetensors"], {"weight_name": "b.safetensors"}, "got no such file"),
        (["a.safetensors"], {"subfolder": "sub"}, "expected an adapter|no such folder"),
    ],
)
def test_folders_without_an_unambiguous_adapter(unet, tmp_path, files, options, words):
    (tmp_path / "folder").mkdir()
    for file in (tmp_path / "secret.safetensors", *(tmp_path / "folder" / name for name in files)):
        save_file(random_lora(unet, where="attn"), file)
    with pytest.raises(CheckpointError, match=words) as caught:
        unet.load_lora_adapter(tmp_path / "folder", **options)
    assert caught.value.path is not None
    assert unet.adapter_names() == []


# ---- made for text prompts


@pytest.mark.parametrize("name", ["text_encoder.text_model.q_proj.lora_A", "lora_te_text_model_q_proj.lora_down"])
def test_tensors_of_a_text_encoder_are_ignored_with_a_warning(unet, name):
    text = {f"{name}.weight": torch.zeros(4, 24)}
    with pytest.warns(UserWarning, match="was made for text prompts, .*; its 1 tensor for a text encoder are ignored"):
        unet.load_lora_adapter(random_lora(unet, where="attn") | text, prefix="unet")
    assert TO_Q in unet._adapters.originals
    unet.unload_lora()
    with (
        pytest.warns(UserWarning, match="was made for text prompts"),
        pytest.raises(CheckpointError, match=r"expected LoRA tensors .* got none"),
    ):
        unet.load_lora_adapter(text)


def test_metadata_of_kohya_means_text_prompts(unet, tmp_path):
    save_file(kohya(unet, "attn"), tmp_path / FILE, metadata={"ss_base_model_version": "sd_v1", "ss_network_dim": "4"})
    with pytest.warns(UserWarning, match=r"pytorch_lora_weights.safetensors: this LoRA was made for text prompts"):
        unet.load_lora_adapter(tmp_path)


def test_an_adapter_for_images_is_loaded_without_a_warning(unet, tmp_path):
    save_file(random_lora(unet), tmp_path / FILE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unet.load_lora_adapter(tmp_path)


# ---- refused

DOWN, UP = f"unet.{TO_Q}.lora.down.weight", f"unet.{TO_Q}.lora.up.weight"


def with_entry(key, tensor):
    return lambda lora: lora | {key: tensor}


@pytest.mark.parametrize(
    ("change", "words", "key"),
    [
        (with_entry("unet.nowhere.lora.down.weight", torch.zeros(4, 16)), "got 1 unknown tensor: unet", "unet.nowhere"),
        (with_entry(f"unet.{TO_Q}.lora_mid.weight", torch.zeros(4, 4, 3, 3)), "1 unknown tensor: ", "lora_mid"),
        (with_entry(f"unet.{TO_Q}.dora_scale", torch.zeros(16)), "1 unknown tensor: ", "dora_scale"),
        (
            with_entry(f"unet.{TO_Q}.lora_magnitude_vector", torch.zeros(16)),
            "1 unknown tensor: ",
            "lora_magnitude_vector",
        ),
        (with_entry(f"unet.{TO_Q}.lora_B.bias", torch.zeros(16)), "1 unknown tensor: ", "bias"),
        (with_entry("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", torch.zeros(4)), "unknown", "hada_w1_a"),
        (with_entry("unet.conv_in.weight", torch.zeros(16, 4, 3, 3)), "1 unknown tensor: ", "unet.conv_in.weight"),
        (with_entry(f"{TO_Q}.lora_A.weight", torch.zeros(4, 16)), "one spelling of each tensor", DOWN),
        (with_entry(DOWN, torch.zeros(4, 17)), r"shape \(4, 16\) for .*to_q, got \(4, 17\)", DOWN),
        (with_entry(DOWN, torch.zeros(4, 16, 1, 1)), r"shape \(4, 16\)", DOWN),
        (with_entry(DOWN, torch.tensor(1.0)), r"shape \(0, 16\)", DOWN),
        (with_entry(DOWN, torch.zeros(0, 16)), r"shape \(0, 16\)", DOWN),
        (with_entry(UP, torch.zeros(16, 5)), r"shape \(16, 4\)", UP),
        (with_entry(UP, torch.full((16, 4), math.nan)), "finite values, got NaN or infinity", UP),
        (with_entry(DOWN, torch.full((4, 16), -math.inf)), "finite values, got NaN or infinity", DOWN),
        (with_entry(DOWN, torch.zeros(4, 16, dtype=torch.int32)), "floating-point values, got torch.int32", DOWN),
        (with_entry(f"unet.{TO_Q}.alpha", torch.tensor([1.0, 2.0])), r"shape \(\)", "alpha"),
        (with_entry(f"unet.{TO_Q}.alpha", torch.tensor(math.nan)), "finite values", "alpha"),
        (lambda lora: {k: v for k, v in lora.items() if k != UP}, "lora down and up of each layer, got no up", DOWN),
        (lambda lora: {k: v for k, v in lora.items() if k != DOWN}, "got no down", UP),
        (lambda lora: {}, r"expected LoRA tensors \(down, up, alpha\) of the UNet's layers, got none", ""),
    ],
)
def test_tensors_that_are_refused(unet, tmp_path, change, words, key):
    lora = change(random_lora(unet, where="attn"))
    save_file(lora, tmp_path / FILE)
    before = [weight.clone() for weight in unet.parameters()]
    assert_refused(lambda: unet.load_lora_adapter(tmp_path), tmp_path / FILE, words)
    with pytest.raises(CheckpointError, match=words) as caught:
        unet.load_lora_adapter(lora)
    assert key in str(caught.value)
    assert unet.adapter_names() == []
    assert all(torch.equal(a, b) for a, b in zip(before, unet.parameters(), strict=True))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"\x40\0\0\0\0\0\0\0{   ", "cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "a git-lfs pointer"),
        (b"<html>", "a web page"),
    ],
)
def test_files_that_are_refused(unet, tmp_path, content, words):
    (tmp_path / FILE).write_bytes(content)
    assert_refused(lambda: unet.load_lora_adapter(tmp_path), tmp_path / FILE, words)


def test_a_pickle_that_is_a_program_is_refused(unet, tmp_path):
    torch.save({DOWN: print}, tmp_path / "pytorch_lora_weights.bin")
    assert_refused(lambda: unet.load_lora_adapter(tmp_path), tmp_path / "pytorch_lora_weights.bin", "references")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"lora_alpha": "4"}, "lora_alpha: expected a finite number, got '4'"),
        ({"lora_alpha": True}, "lora_alpha: expected a finite number"),
        ({"lora_alpha": 4, "alpha_pattern": [1]}, "alpha_pattern: expected a dictionary, got list"),
        ({"lora_alpha": 4, "alpha_pattern": {"(a+)+$": 1}}, r"alpha_pattern: expected names of layers, got '\(a\+\)"),
    ],
)
def test_configs_that_are_refused(unet, tmp_path, config, words):
    save_file(random_lora(unet, where="attn"), tmp_path / FILE, metadata={"lora_adapter_metadata": json.dumps(config)})
    assert_refused(lambda: unet.load_lora_adapter(tmp_path), tmp_path / FILE, words)


def test_sources_of_another_type_are_refused(unet):
    for source in (None, 5, [], {5: torch.zeros(1)}, {"a": [1.0]}, {"a": torch.zeros(1, device="meta")}):
        with pytest.raises(InputError):
            unet.load_lora_adapter(source)


@pytest.mark.parametrize("name", ["lora.safetensors", "L.SAFETENSORS", "blob"])
def test_the_alpha_in_a_file_counts_whatever_the_name_of_the_file(unet, tmp_path, name):
    expected = copy.deepcopy(unet)
    metadata = {"lora_adapter_metadata": json.dumps({"lora_alpha": 16, "r": 4})}
    save_file(random_lora(unet, where="attn"), tmp_path / name, metadata=metadata)
    unet.load_lora_adapter(tmp_path / name)
    expected.load_lora_adapter(random_lora(unet, where="attn"), weight=16 / 4)  # alpha / r
    assert_same_weights(unet, expected)
