"""Training on CUDA: compiled, in bfloat16, and with gradient checkpointing, as `scripts/train_emoji` does it."""

import numpy as np
import pytest
import torch
from train_emoji import autoencoder, classifiers, diffusion, encoder, loop
from train_emoji.catalogue import codes
from train_emoji.drawings import Drawings
from train_emoji.networks import Classifier

import imvar

CONCEPTS = ["🐶", "🐱", "🍎", "🚗"]


@pytest.fixture(scope="module")
def drawings():
    pairs = [(code, style) for code in sorted(codes(CONCEPTS)) for style in ("noto", "twemoji", "fluent-3d")]
    images = torch.randint(0, 256, (len(pairs), 4, 64, 64), dtype=torch.uint8, generator=torch.manual_seed(0))
    return Drawings(images, np.array([code for code, _ in pairs]), np.array([style for _, style in pairs]))


def job(name, drawings, folder):
    cuda = torch.device("cuda")
    if name == "teacher":
        return classifiers.job(name, drawings, CONCEPTS, drawings, cuda, batch=16)
    if name == "encoder":
        model = imvar.CLIPVisionModelWithProjection(**encoder.SETTINGS)
        teacher = Classifier(sorted(codes(CONCEPTS)))
        return encoder.job(name, model, encoder.image_embeds, drawings, teacher, CONCEPTS, drawings, cuda, batch=16)
    if name == "vae":
        return autoencoder.job(drawings, drawings, drawings, folder, cuda, batch=16)
    bank = diffusion.Bank(torch.rand(len(drawings), 2, 2, 4, 16, 16).cuda(), torch.randn(len(drawings), 2, 128).cuda())
    return diffusion.job(drawings, bank, cuda, batch=16)


@pytest.mark.parametrize("name", ["teacher", "encoder", "vae", "unet"])
def test_each_stage_learns(name, drawings, tmp_path):
    torch.manual_seed(0)
    chosen = job(name, drawings, tmp_path)
    losses = []
    plain = chosen.loss

    def counted(generator):
        drawn = plain(generator)
        losses.append(float((drawn[0] if isinstance(drawn, tuple) else drawn).detach()))
        return drawn

    chosen.loss = counted
    loop.train(chosen, tmp_path, 1.5, 0, torch.device("cuda"))  # minutes, most of which go into compiling
    assert len(losses) > 20
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_gradients_are_the_same_compiled_and_with_checkpointing():
    torch.manual_seed(0)
    unet = imvar.UNet2DConditionModel(**diffusion.SETTINGS).cuda().train()
    inputs = torch.randn(2, 4, 16, 16).cuda(), torch.tensor([10, 900]).cuda(), torch.randn(2, 1, 128).cuda()
    grads = []
    for change in (lambda: None, unet.enable_gradient_checkpointing, unet.compile):
        change()
        unet(*inputs).sample.square().mean().backward()
        grads.append([p.grad.clone() for p in unet.parameters() if p.grad is not None])
        unet.zero_grad()
    for other in grads[1:]:
        for one, two in zip(grads[0], other, strict=True):
            assert (one - two).abs().max() <= 1e-3 * one.abs().max() + 1e-6
