"""LoRA in the UNet: adapters beside diffusers and peft with the same weights, and that removing them is exact."""

import diffusers
import pytest
import torch

from imvar import UNet2DConditionModel
from imvar.models.stock import is_unmodified
from tests.support.lora import random_lora
from tests.support.random_checkpoint import TINY_UNET, randomize

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture
def unet():
    return randomize(UNet2DConditionModel(**TINY_UNET), 2)


@pytest.fixture
def theirs(unet):
    """diffusers' UNet with the same weights."""
    unet_of_diffusers = diffusers.UNet2DConditionModel(**TINY_UNET)
    unet_of_diffusers.load_state_dict(unet.state_dict())
    return unet_of_diffusers.eval()


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
    torch.testing.assert_close(output(unet), output(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_unloading_returns_the_same_bits(unet, dtype):
    unet.to(dtype)
    before, parameters = snapshot(unet), list(unet.parameters())
    unet.load_lora_adapter(random_lora(unet), adapter_name="a", weight=0.3)
    unet.load_lora_adapter(random_lora(unet, seed=1), adapter_name="b", weight=-2)
    unet.set_adapters(["a", "b"], [0.1, 0.7])
    assert not is_same(unet, before)
    unet.unload_lora()
    assert is_same(unet, before)
    assert all(a is b for a, b in zip(parameters, unet.parameters(), strict=True))


def test_the_layers_stay_unmodified(unet):
    names = unet.state_dict().keys()
    unet.load_lora_adapter(random_lora(unet))
    assert is_unmodified(unet)
    assert unet.state_dict().keys() == names
