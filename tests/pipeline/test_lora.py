"""LoRA in the pipeline: the methods of diffusers' pipelines, and images with adapters on every path."""

import copy
import inspect
import json
import pickle

import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open

from imvar import InputError, StableDiffusionImageVariationPipeline
from imvar.kernels.int8_kernels import has_int8_kernels
from tests.support.lora import random_lora
from tests.support.random_checkpoint import TINY_UNET, tiny_pipeline

METHODS = [
    "load_lora_weights",
    "save_lora_weights",
    "unload_lora_weights",
    "set_adapters",
    "get_active_adapters",
    "get_list_adapters",
    "delete_adapters",
    "enable_lora",
    "disable_lora",
    "fuse_lora",
    "unfuse_lora",
]


WAYS = ["plain", "cached", "fp8", "offload", "compiled", "compiled UNet", "compiled block", "shared components", "half"]
WAYS += ["int8"] if has_int8_kernels() else []


@pytest.fixture
def theirs(pipe):
    """A pipeline of diffusers' whose UNet has the same weights."""
    unet = diffusers.UNet2DConditionModel(**TINY_UNET)
    unet.load_state_dict(pipe.unet.state_dict())
    nothing = dict.fromkeys(["vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    scheduler = diffusers.PNDMScheduler(steps_offset=1)
    return diffusers.StableDiffusionPipeline(
        unet=unet.eval(), scheduler=scheduler, requires_safety_checker=False, **nothing
    )


@torch.no_grad()
def output(unet):
    generator = torch.Generator().manual_seed(0)
    sample, context = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 1, 24, generator=generator)
    return unet(sample, 5, context).sample


def images_of(pipe, photo, **options):
    return pipe(photo, **({"num_inference_steps": 3, "output_type": "np", "seed": 0} | options)).images


@pytest.mark.parametrize("name", METHODS)
def test_arguments_are_those_of_diffusers(name):
    ours = inspect.signature(getattr(StableDiffusionImageVariationPipeline, name)).parameters
    reference = inspect.signature(getattr(StableDiffusionLoraLoaderMixin, name)).parameters
    positional = [p.name for p in reference.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in ours.values() if p.kind == p.POSITIONAL_OR_KEYWORD] == positional


@pytest.mark.filterwarnings("ignore:.*(Already|active adapters|was active)")
def test_a_session_equals_diffusers(pipe, theirs):
    """Each method in turn, with the same names of adapters and the same output as diffusers."""
    first, second = random_lora(pipe.unet, where="attn"), random_lora(pipe.unet, where="attn", seed=1)
    before = output(pipe.unet)
    for use in (
        lambda pipe: pipe.load_lora_weights(dict(first)),
        lambda pipe: pipe.load_lora_weights(dict(second), adapter_name="b"),
        lambda pipe: pipe.set_adapters("default_0"),
        lambda pipe: pipe.set_adapters(["default_0", "b"], 0.5),
        lambda pipe: pipe.set_adapters(["default_0", "b"], [0.3, -1]),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.set_adapters("b", 2.0),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.delete_adapters("b"),
        lambda pipe: pipe.load_lora_weights(dict(second), "default_0", True),  # hotswap
        lambda pipe: pipe.fuse_lora(lora_scale=0.7),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.unload_lora_weights(),
        lambda pipe: pipe.load_lora_weights(dict(first), "c"),
        lambda pipe: pipe.delete_adapters("c"),
        lambda pipe: pipe.unload_lora_weights(),
    ):
        use(pipe)
        use(theirs)
        assert pipe.get_active_adapters() == theirs.get_active_adapters()
        names = theirs.get_list_adapters()
        assert pipe.get_list_adapters() == (names if names.get("unet") else {})
        torch.testing.assert_close(output(pipe.unet), output(theirs.unet), atol=2e-5, rtol=0)
    assert not torch.equal(output(pipe.unet), before)  # what was fused has stayed


def test_the_weight_of_loading(pipe, theirs):
    lora = random_lora(pipe.unet)
    pipe.load_lora_weights(lora, "a", weight=0.4)
    theirs.load_lora_weights(lora, "a")
    theirs.set_adapters("a", 0.4)
    torch.testing.assert_close(output(pipe.unet), output(theirs.unet), atol=1e-5, rtol=0)


def content(folder):
    """Return the names of an adapter's tensors and its metadata, whose sets diffusers writes in any order."""
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = {key: text if key == "format" else json.loads(text) for key, text in file.metadata().items()}
        config = metadata.get("lora_adapter_metadata", {})
        config["unet.target_modules"] = sorted(config.get("unet.target_modules", []))
        return sorted(file.keys()), metadata


@pytest.mark.parametrize("metadata", [True, False], ids=["with alpha", "alpha is the rank"])
def test_a_trained_adapter_is_exchanged_with_diffusers(pipe, theirs, tmp_path, metadata):
    trained = copy.deepcopy(pipe.unet)
    config = peft.LoraConfig(r=4, lora_alpha=9 if metadata else 4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    trained.add_adapter(config)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tensors = get_peft_model_state_dict(trained)
    options = {"unet_lora_adapter_metadata": config.to_dict()} if metadata else {}
    StableDiffusionImageVariationPipeline.save_lora_weights(tmp_path / "ours", unet_lora_layers=tensors, **options)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / "theirs", unet_lora_layers=tensors, **options)
    assert content(tmp_path / "ours") == content(tmp_path / "theirs")
    theirs.load_lora_weights(tmp_path / "ours")
    pipe.load_lora_weights(tmp_path / "theirs")
    torch.testing.assert_close(output(theirs.unet), output(trained), atol=1e-5, rtol=0)
    torch.testing.assert_close(output(pipe.unet), output(trained), atol=1e-5, rtol=0)


def test_a_pipeline_with_an_adapter_in_training_equals_one_with_it_loaded(pipe, photo, tmp_path):
    """Validation in the midst of training, and use afterwards."""
    loaded = copy.deepcopy(pipe)
    pipe.unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    images = images_of(pipe, photo)
    assert pipe.get_list_adapters() == {"unet": ["default"]}
    pipe.unet.save_lora_adapter(tmp_path)
    loaded.load_lora_weights(tmp_path)
    assert np.abs(images_of(loaded, photo) - images).max() < 1e-5
    pipe.unload_lora_weights()
    loaded.unload_lora_weights()
    assert np.array_equal(images_of(loaded, photo), images_of(pipe, photo))


@pytest.mark.parametrize("way", WAYS)
def test_images_with_an_adapter_change_and_return(pipe, photo, way):
    options = {"cache_interval": 2} if way == "cached" else {}
    owner = pipe
    if way == "fp8":
        pipe.enable_fp8()
    if way == "int8":
        pipe.enable_int8()
    if way == "offload":
        pipe.enable_model_cpu_offload(device="cpu:0")
    if way == "compiled":
        pipe.compile(backend="eager")
    if way == "compiled UNet":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    if way == "compiled block":
        pipe.unet.mid_block = torch.compile(pipe.unet.mid_block, backend="eager")
    if way == "half":
        pipe.to(torch.bfloat16)
    if way == "shared components":
        owner = StableDiffusionImageVariationPipeline(**pipe.components)
    lora = random_lora(tiny_pipeline().unet)
    before = images_of(pipe, photo, **options)
    owner.load_lora_weights(lora)
    changed = images_of(pipe, photo, **options)
    assert np.abs(changed - before).max() > 0.01
    owner.disable_lora()
    assert np.array_equal(images_of(pipe, photo, **options), before)
    owner.enable_lora()
    assert np.array_equal(images_of(pipe, photo, **options), changed)
    owner.unload_lora_weights()
    assert np.array_equal(images_of(pipe, photo, **options), before)


@pytest.mark.parametrize("kind", ["fp8", "int8"] if has_int8_kernels() else ["fp8"])
def test_eight_bits_after_loading_an_adapter(pipe, photo, kind):
    enable, disable = (getattr(pipe, f"{verb}_{kind}") for verb in ("enable", "disable"))
    lora = random_lora(pipe.unet)
    pipe.load_lora_weights(lora)
    enable()
    images = images_of(pipe, photo)
    pipe.unload_lora_weights()
    disable()
    assert np.array_equal(images_of(pipe, photo), images_of(tiny_pipeline(), photo))
    enable()
    pipe.load_lora_weights(lora)
    assert np.array_equal(images_of(pipe, photo), images)


def test_a_change_in_a_callback_counts_from_the_next_step(pipe, photo):
    """As if the steps before had been made by one UNet and the ones after by another."""
    lora = random_lora(pipe.unet)
    other = tiny_pipeline()
    other.load_lora_weights(lora)

    def load(i, *_):
        if i == 1:
            pipe.load_lora_weights(lora)

    def swap(i, *_):
        if i == 1:
            pipe.unet = other.unet

    unet = pipe.unet
    loaded = images_of(pipe, photo, callback=load, num_inference_steps=4)
    pipe.unload_lora_weights()
    swapped = images_of(pipe, photo, callback=swap, num_inference_steps=4)
    pipe.unet = unet
    assert np.array_equal(loaded, swapped)
    assert not np.array_equal(loaded, images_of(pipe, photo, num_inference_steps=4))


def test_saving_and_copies_of_a_pipeline_with_an_adapter(pipe, photo, tmp_path):
    before = images_of(pipe, photo)
    pipe.load_lora_weights(random_lora(pipe.unet))
    changed = images_of(pipe, photo)
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert np.array_equal(images_of(twin, photo), changed)
        twin.unload_lora_weights()
        assert np.array_equal(images_of(twin, photo), before)
    with pytest.warns(UserWarning, match="the weights without the loaded adapters are saved"):
        pipe.save_pretrained(tmp_path / "without")
    assert np.array_equal(images_of(pipe, photo), changed)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "with")
    for folder, images in ("without", before), ("with", changed):
        loaded = StableDiffusionImageVariationPipeline.from_pretrained(tmp_path / folder)
        assert np.array_equal(images_of(loaded, photo), images)


def test_without_adapters(pipe):
    assert pipe.get_active_adapters() == []
    assert pipe.get_list_adapters() == {}
    for nothing in (pipe.unload_lora_weights, pipe.disable_lora, pipe.enable_lora, pipe.fuse_lora, pipe.unfuse_lora):
        nothing()
    with pytest.raises(InputError, match="adapter_names: expected a model with adapters"):
        pipe.set_adapters("a")


def test_wrong_arguments_are_refused_by_name(pipe, tmp_path):
    lora = random_lora(pipe.unet, where="attn")
    for words, use in [
        (
            r"components: expected a list of unet or text_encoder, got \['vae'\]",
            lambda: pipe.fuse_lora(components=["vae"]),
        ),
        ("unknown argument 'scale'", lambda: pipe.load_lora_weights(lora, scale=2)),
        ("unet_lora_layers: expected tensors by name, got None", lambda: pipe.save_lora_weights(tmp_path)),
        (
            "text_encoder_lora_layers: expected None, got dict; this pipeline has no text encoder",
            lambda: pipe.save_lora_weights(tmp_path, lora, lora),
        ),
    ]:
        with pytest.raises(InputError, match=words):
            use()
    pipe.save_lora_weights(tmp_path, lora, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_a_third_party_unet_has_methods_of_its_own(pipe, theirs):
    pipe.unet = theirs.unet
    with pytest.raises(InputError, match=r"unet: expected imvar's UNet2DConditionModel, .* use its own methods"):
        pipe.load_lora_weights({})
