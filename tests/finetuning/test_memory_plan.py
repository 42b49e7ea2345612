"""The plan of the memory of fine-tuning, beside what the same step allocates with data."""

import numpy as np
import pytest
import torch
from finetuning.memory_plan import Options, Plan, allocate, train_once
from finetuning.memory_trace import Footprint
from finetuning.trainable import choose_parameters
from torch._subclasses.fake_tensor import FakeTensorMode

from imvar import UNet2DConditionModel

CONFIG = UNet2DConditionModel.load_config("imvar-emoji", subfolder="unet") | {
    "down_block_types": ["CrossAttnDownBlock2D"] * 2
}
CONFIG |= {"up_block_types": ["CrossAttnUpBlock2D"] * 2, "block_out_channels": [32, 64]}


def build(stage, checkpointing, batch=2):
    """Return the UNet of a stage on the current device, and the shape of a batch of latents."""
    unet = UNet2DConditionModel.from_config(CONFIG)
    choose_parameters(unet.train(), stage, rank=4)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return unet, (batch, 4, 16, 16)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["unet", "lora"])
def test_a_step_allocates_what_it_allocates_with_data(stage, checkpointing):
    unet, shape = build(stage, checkpointing)
    real = train_once(unet, shape, torch.bfloat16)
    with torch.device("meta"):
        unet, shape = build(stage, checkpointing)
    with FakeTensorMode():
        allocate(unet, torch.float32)
        planned = train_once(unet, shape, torch.bfloat16)
    assert planned.trace.live_bytes().tolist() == real.trace.live_bytes().tolist()
    assert planned.forward_end == real.forward_end


def example(accumulates=False, **options):
    training = Footprint(np.array([0, 100, 50]), np.array([0, 10, 20]), np.array([0, 0, 400]), 1)
    return Plan(Options(accumulates=accumulates, **options), 1000, 300, 400, 200, training, None)


def test_items_of_a_plan():
    items = example().items(2)
    assert (items["weights"], items["gradients"], items["optimizer states"]) == (1000, 400, 800)
    assert (items["activations"], items["buckets of DDP"], items["VAE and image encoder"]) == (90, 0, 0)
    assert example(ranks=2).items(2)["buckets of DDP"] == 400
    assert example(bank=False).items(2)["VAE and image encoder"] == 300
    sharded = example(ranks=2, shard=True).items(2)
    assert (sharded["weights"], sharded["gradients"], sharded["optimizer states"]) == (500, 200, 400)


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    plan = example()
    size = plan.total(7)
    assert plan.largest_batch(size) == 7
    assert plan.total(8) > size
    assert plan.largest_batch(size - 1) == 6
    assert plan.largest_batch(plan.total(1) - 1) == 0
