"""Random LoRA adapters, and a UNet for them in both libraries."""

import diffusers
import torch
from torch import nn

from imvar import UNet2DConditionModel
from tests.support.random_checkpoint import TINY_UNET, randomize


def random_unet():
    return randomize(UNet2DConditionModel(**TINY_UNET), 2)


def unet_of_diffusers(unet):
    """Return diffusers' UNet with the same weights."""
    reference = diffusers.UNet2DConditionModel(**TINY_UNET)
    reference.load_state_dict(unet.state_dict())
    return reference.eval()


def random_lora(unet, rank=4, seed=0, where="", prefix="unet.", halves=("lora.down", "lora.up")):
    """Return an adapter for every linear and convolutional layer with `where` in its name, as diffusers names it."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, layer in unet.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and where in name:
            out_features, in_features, *kernel = layer.weight.shape
            shapes = (rank, in_features, *kernel), (out_features, rank, *(1 for _ in kernel))
            for half, shape in zip(halves, shapes, strict=True):
                tensors[f"{prefix}{name}.{half}.weight"] = 0.1 * torch.randn(shape, generator=generator)
    return tensors
