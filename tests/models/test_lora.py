"""LoRA in the UNet: adapters beside diffusers and peft with the same weights, and that removing them is exact."""

import copy
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from imvar import InputError, UNet2DConditionModel
from imvar.models.stock import is_unmodified
from tests.support.lora import random_lora, random_unet, unet_of_diffusers
from tests.support.random_checkpoint import TINY_UNET, randomize

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def unet():
    return random_unet()


@pytest.fixture
def theirs(unet):
    return unet_of_diffusers(unet)


@torch.no_grad()
def output(unet):
    generator = torch.Generator().manual_seed(0)
    sample, context = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 1, 24, generator=generator)
    return unet(sample.to(unet.dtype), 5, context.to(unet.dtype)).sample.float()


def snapshot(unet):
    return {name: weight.clone() for name, weight in unet.state_dict().items()}


def is_same(unet, weights):
    return all(torch.equal(weight, weights[name]) for name, weight in unet.state_dict().items())


# ---- loading and unloading


def test_an_adapter_of_every_layer_equals_diffusers(unet, theirs):
    lora = random_lora(unet)
    unet.load_lora_adapter(lora, prefix="unet")
    theirs.load_lora_adapter(lora, prefix="unet")
    torch.testing.assert_close(output(unet), output(theirs), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_unloading_returns_the_same_bits(unet, dtype):
    unet.to(dtype)
    before, parameters = snapshot(unet), list(unet.parameters())
    unet.load_lora_adapter(random_lora(unet), adapter_name="a", weight=0.3)
    unet.load_lora_adapter(random_lora(unet, seed=1, where="attn"), adapter_name="b", weight=-2)
    unet.set_adapters(["a", "b"], [0.1, 0.7])
    assert not is_same(unet, before)
    unet.unload_lora()
    assert is_same(unet, before)
    assert all(a is b for a, b in zip(parameters, unet.parameters(), strict=True))


def test_disabling_deleting_and_a_weight_of_zero_return_the_same_bits(unet):
    before = snapshot(unet)
    unet.load_lora_adapter(random_lora(unet, where="attn"), adapter_name="a")
    unet.disable_adapters()
    assert is_same(unet, before)
    unet.enable_adapters()
    assert not is_same(unet, before)
    unet.set_adapters("a", 0)
    assert is_same(unet, before)
    unet.set_adapters("a")
    unet.delete_adapters("a")
    assert is_same(unet, before)
    assert unet.adapter_names() == []


def test_the_layers_stay_unmodified(unet):
    names = unet.state_dict().keys()
    unet.load_lora_adapter(random_lora(unet))
    assert is_unmodified(unet)
    assert unet.state_dict().keys() == names


def test_only_weights_with_an_adapter_are_kept_twice(unet):
    unet.load_lora_adapter(random_lora(unet, where="attn1.to_q"), adapter_name="a")
    unet.load_lora_adapter(random_lora(unet, where="conv_in"), adapter_name="b")
    assert {name.rpartition("attn1.")[2] for name in unet._adapters.originals} == {"to_q", "conv_in"}
    unet.delete_adapters("b")
    assert {name.rpartition("attn1.")[2] for name in unet._adapters.originals} == {"to_q"}


def test_an_adapter_that_overflows_leaves_everything_as_it_was(unet):
    unet.to(torch.float16)
    unet.load_lora_adapter(random_lora(unet, where="attn"), adapter_name="a")
    before = snapshot(unet)
    with pytest.raises(InputError, match=r"weight: expected values within torch.float16 with the adapters, got inf"):
        unet.load_lora_adapter(random_lora(unet, seed=1), adapter_name="b", weight=1e7)
    with pytest.raises(InputError, match="lower their weights"):
        unet.set_adapters("a", -1e7)
    assert is_same(unet, before)
    assert unet.active_adapters() == unet.adapter_names() == ["a"]


def test_weights_loaded_in_inference_mode(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    with torch.inference_mode():
        loaded = UNet2DConditionModel.from_pretrained(tmp_path)
        assert loaded.conv_in.weight.is_inference()
    before, lora = snapshot(loaded), random_lora(loaded)
    loaded.load_lora_adapter(lora)
    unet.load_lora_adapter(lora)
    assert torch.equal(output(loaded), output(unet))
    loaded.unload_lora()
    assert is_same(loaded, before)


def test_an_adapter_loaded_under_autocast_and_inference_mode_is_exact(unet):
    other = copy.deepcopy(unet)
    lora = random_lora(unet)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        unet.load_lora_adapter(lora)
    other.load_lora_adapter(lora)
    assert is_same(unet, other.state_dict())
    unet.set_adapters("default_0", 0.5)


# ---- dtype, copies


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_equals_loading_the_adapter_afterwards(unet, dtype):
    other, lora = copy.deepcopy(unet).to(dtype), random_lora(unet)
    unet.load_lora_adapter(lora, weight=0.7)
    unet.to(dtype)
    other.load_lora_adapter(lora, weight=0.7)
    assert is_same(unet, other.state_dict())
    unet.unload_lora()
    other.unload_lora()
    assert is_same(unet, other.state_dict())


def test_casting_up_adds_the_adapter_in_full_precision(unet):
    lora = random_lora(unet)
    unet.half()
    other = copy.deepcopy(unet).float()
    unet.load_lora_adapter(lora)
    unet.float()
    other.load_lora_adapter(lora)
    assert is_same(unet, other.state_dict())


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_a_copy_has_adapters_of_its_own(unet, twin_of):
    before = snapshot(unet)
    unet.load_lora_adapter(random_lora(unet))
    twin = twin_of(unet)
    assert torch.equal(output(twin), output(unet))
    twin.unload_lora()
    assert is_same(twin, before)
    assert not is_same(unet, before)
    unet.unload_lora()
    assert is_same(unet, before)


# ---- what else may happen to weights with adapters


def step_of_an_optimizer(unet):
    weight = unet.conv_in.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=1e-3).step()


def average_of_weights(unet):
    """Write as diffusers' EMAModel does, which autograd does not count."""
    unet.conv_in.weight.data.copy_(unet.conv_in.weight.data * 1.01)


def checkpoint_of_before(unet):
    unet.load_state_dict(randomize(UNet2DConditionModel(**TINY_UNET), 3).state_dict())


def another_parameter(unet):
    unet.conv_in.weight = torch.nn.Parameter(torch.zeros_like(unet.conv_in.weight))


@pytest.mark.parametrize("change", [step_of_an_optimizer, average_of_weights, checkpoint_of_before, another_parameter])
def test_changes_of_weights_with_adapters_are_not_lost(unet, change, tmp_path):
    unet.load_lora_adapter(random_lora(unet), adapter_name="a")
    change(unet)
    changed = snapshot(unet)
    for use in (
        unet.unload_lora,
        unet.disable_lora,
        lambda: unet.set_adapters("a", 0.5),
        lambda: unet.load_lora_adapter(random_lora(unet)),
        unet.half,
        lambda: unet.save_pretrained(tmp_path / "unet"),
    ):
        with pytest.raises(InputError, match=r"weight: expected what the adapters were .* call fuse_lora\(\), then"):
            use()
        assert is_same(unet, changed)
    unet.fuse_lora()
    unet.unload_lora()
    assert is_same(unet, changed)
    unet.save_pretrained(tmp_path / "unet")
    assert is_same(UNet2DConditionModel.from_pretrained(tmp_path / "unet"), changed)


def test_training_weights_with_adapters_is_refused(unet):
    unet.load_lora_adapter(random_lora(unet, where="attn"), adapter_name="a")
    with pytest.raises(InputError, match="train: expected a model without loaded adapters, got a; call unload_lora"):
        unet.train()
    assert not unet.training
    unet.requires_grad_(False)
    unet.train()  # of other layers, such as one in front of it
    unet.eval().requires_grad_(True)
    unet.fuse_lora()
    assert unet.train().training


def test_training_without_a_layer_that_has_an_adapter_is_refused_by_the_other_layers(unet):
    unet.load_lora_adapter(random_lora(unet, where="attn") | random_lora(unet, where="conv_in"), adapter_name="a")
    unet.conv_in = torch.nn.Identity()
    with pytest.raises(InputError, match="train: expected a model without loaded adapters, got a"):
        unet.train()


def test_saving_writes_the_weights_without_adapters_and_warns(unet, tmp_path):
    before = snapshot(unet)
    unet.load_lora_adapter(random_lora(unet))
    with pytest.warns(UserWarning, match="the weights without the loaded adapters are saved"):
        unet.save_pretrained(tmp_path)
    assert is_same(UNet2DConditionModel.from_pretrained(tmp_path), before)


def test_fused_adapters_stay_in_the_weights_and_are_saved(unet, theirs, tmp_path, recwarn):
    lora = random_lora(unet)
    for model in (unet, theirs):
        model.load_lora_adapter(lora, prefix="unet", adapter_name="a")
        model.fuse_lora(lora_scale=0.5)
        model.unload_lora()
    unet.save_pretrained(tmp_path)
    assert not [warning for warning in recwarn if "adapters" in str(warning.message)]
    assert is_same(UNet2DConditionModel.from_pretrained(tmp_path), unet.state_dict())
    torch.testing.assert_close(output(unet), output(theirs), **CLOSE)
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(unet.state_dict()[name], weight, **CLOSE)


def test_fused_adapters_do_not_change(unet):
    before = snapshot(unet)
    unet.load_lora_adapter(random_lora(unet), adapter_name="a")
    unet.fuse_lora()
    for use in (
        lambda: unet.set_adapters("a", 0.5),
        lambda: unet.delete_adapters("a"),
        lambda: unet.load_lora_adapter(random_lora(unet)),
        unet.disable_lora,
    ):
        with pytest.raises(InputError, match=r"adapters: expected no fused adapters, got a; call unfuse_lora\(\)"):
            use()
    unet.unfuse_lora()
    unet.unload_lora()
    assert is_same(unet, before)


# ---- adapters for training


def trainable(unet, **settings):
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | settings))
    unet.add_adapter(config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in unet.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return config


def test_a_step_of_training_equals_diffusers(unet, theirs):
    for model in (unet, theirs):
        trainable(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        generator = torch.Generator().manual_seed(0)
        model.train()
        sample, context = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 1, 24, generator=generator)
        model(sample, 5, context).sample.square().mean().backward()
        optimizer.step()
        model.eval()
    ours, reference = get_peft_model_state_dict(unet), get_peft_model_state_dict(theirs)
    assert ours.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(ours[name], tensor, **CLOSE)
    torch.testing.assert_close(output(unet), output(theirs), **CLOSE)


def test_a_trained_adapter_is_read_by_diffusers_and_added_to_the_weights(unet, theirs, tmp_path):
    fresh = copy.deepcopy(unet)
    trainable(unet, alpha_pattern={"attn1.to_q": 2}, rank_pattern={"attn2.to_v": 7}, use_rslora=True)
    unet.save_lora_adapter(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    theirs.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    fresh.load_lora_adapter(tmp_path)
    torch.testing.assert_close(output(theirs), output(unet), **CLOSE)
    torch.testing.assert_close(output(fresh), output(unet), **CLOSE)


def test_an_adapter_trained_in_diffusers_is_read(unet, theirs, tmp_path):
    trainable(theirs)
    theirs.save_lora_adapter(tmp_path)
    unet.load_lora_adapter(tmp_path)
    torch.testing.assert_close(output(unet), output(theirs), **CLOSE)


@pytest.mark.parametrize("upcast", [False, True])
def test_a_loaded_adapter_is_saved_as_it_was_read(unet, theirs, tmp_path, upcast):
    lora = random_lora(unet, prefix="", halves=("lora_A", "lora_B"))
    alphas = {f"{name.removesuffix('.lora_A.weight')}.alpha": torch.tensor(2.0) for name in lora if "lora_A" in name}
    unet.load_lora_adapter(lora | alphas, adapter_name="a")
    unet.save_lora_adapter(tmp_path, "a", upcast)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert saved.keys() == lora.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in lora.items())
    theirs.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(output(theirs), output(unet), **CLOSE)


def test_settings_of_adapters_for_training_equal_diffusers(unet, theirs):
    for model in (unet, theirs):
        trainable(model)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False), "b")
    for name, parameter in theirs.named_parameters():
        unet.get_parameter(name).data.copy_(parameter)
    for change in (
        lambda model: model.set_adapter("default"),
        lambda model: model.set_adapters(["default", "b"], [0.5, 2]),
        lambda model: model.disable_adapters(),
        lambda model: model.enable_adapters(),
        lambda model: model.delete_adapters("b"),
        lambda model: model.fuse_lora(0.5),
        lambda model: model.unfuse_lora(),
        lambda model: model.fuse_lora(),
        lambda model: model.unload_lora(),
    ):
        change(unet)
        change(theirs)
        torch.testing.assert_close(output(unet), output(theirs), **CLOSE)
        if hasattr(unet, "peft_config"):
            assert unet.active_adapters() == theirs.active_adapters()
    assert is_unmodified(unet)
    assert unet.state_dict().keys() == theirs.state_dict().keys()


def test_saving_a_model_with_an_adapter_for_training_writes_its_own_weights(unet, tmp_path):
    before = snapshot(unet)
    trainable(unet)
    with pytest.warns(UserWarning, match="adapters are not saved"):
        unet.save_pretrained(tmp_path)
    assert is_same(UNet2DConditionModel.from_pretrained(tmp_path), before)


def test_saving_a_model_whose_block_is_compiled_writes_the_names_without_the_wrapper(unet, tmp_path):
    fresh, before = copy.deepcopy(unet), snapshot(unet)
    unet.mid_block = torch.compile(unet.mid_block, backend="eager")
    trainable(unet)
    unet.save_lora_adapter(tmp_path / "lora")
    with pytest.warns(UserWarning, match="adapters are not saved"):
        unet.save_pretrained(tmp_path / "unet")
    assert is_same(UNet2DConditionModel.from_pretrained(tmp_path / "unet"), before)
    fresh.load_lora_adapter(tmp_path / "lora")
    torch.testing.assert_close(output(fresh), output(unet), **CLOSE)


def test_adapters_for_training_and_loaded_ones_do_not_mix(unet, theirs):
    lora = random_lora(unet, where="attn")
    unet.load_lora_adapter(lora)
    with pytest.raises(InputError, match=r"add_adapter: expected a model without loaded adapters, .* after fuse_lora"):
        trainable(unet)
    unet.fuse_lora()
    unet.unload_lora()
    trainable(unet)
    with pytest.raises(InputError, match=r"expected a model without an adapter for training, .* save_lora_adapter"):
        unet.load_lora_adapter(lora)
    unet.unload_lora()
    unet.load_lora_adapter(lora)


def test_without_peft_the_error_names_it(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['peft'] = None; import imvar;"
        f"unet = imvar.UNet2DConditionModel.from_pretrained({str(tmp_path)!r});"
        "unet.add_adapter(None)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "InputError: peft: expected an installed package" in result.stderr
    assert "pip install peft" in result.stderr


# ---- arguments


def test_wrong_arguments_are_refused_by_name(unet):
    lora = random_lora(unet, where="attn")
    with pytest.raises(InputError, match="adapter_names: expected a model with adapters, got one without"):
        unet.set_adapters("a")
    with pytest.raises(InputError, match="adapter_names: expected a model with adapters"):
        unet.active_adapters()
    unet.load_lora_adapter(lora, adapter_name="a")
    for names, weights, words in [
        ("b", None, "adapter_names: expected names among a, got 'b'"),
        (["a"], [1, 2], "weights: expected 1, one per adapter, got 2"),
        ("a", {"down": 1.0}, "weights: expected a finite number"),
        ("a", float("nan"), "weights: expected a finite number"),
        (5, None, "adapter_names: expected a string or a list of strings, got 5"),
    ]:
        with pytest.raises(InputError, match=words):
            unet.set_adapters(names, weights)
    for options, words in [
        ({"adapter_name": "a"}, "adapter_name: expected a name that no adapter has, got 'a'"),
        ({"adapter_name": "b", "hotswap": True}, "adapter_name: expected the name of a loaded adapter, got 'b'"),
        ({"weight": "much"}, "weight: expected a finite number"),
        ({"scale": 0.5}, "load_lora_adapter: expected .*, got unknown argument 'scale'"),
    ]:
        with pytest.raises(InputError, match=words):
            unet.load_lora_adapter(lora, **options)
    assert unet.adapter_names() == ["a"]
    with pytest.raises(InputError, match="adapter_config: expected a config of peft, got dict"):
        UNet2DConditionModel(**TINY_UNET).add_adapter({"r": 4})
    with pytest.raises(InputError, match="weight_name: expected a file name for safe_serialization=True"):
        unet.save_lora_adapter("nowhere", "a", weight_name="lora.bin")
