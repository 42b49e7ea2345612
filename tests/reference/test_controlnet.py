"""The residuals of diffusers' ControlNet in our UNet, and in diffusers' with the same weights."""

import diffusers
import pytest
import torch

import imvar
from imvar.runtime.denoiser import make_predictor
from tests.support.random_checkpoint import TINY_UNET, randomize

WIDE = {
    "block_out_channels": (8, 16, 32, 32),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
TIMES = torch.tensor([900.0, 500.0, 100.0])


def near(ours, theirs, tolerance=1e-5):
    return (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.fixture(params=[{}, WIDE], ids=["tiny", "four blocks"])
def unets(request):
    ours = randomize(imvar.UNet2DConditionModel(**(TINY_UNET | request.param)), 0)
    theirs = diffusers.UNet2DConditionModel(**(TINY_UNET | request.param)).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def controlnet(unet, **options):
    """A ControlNet as diffusers makes it of our UNet, with random weights in its zero convolutions too."""
    model = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    model.register_to_config(**options)
    return randomize(model, 3)


def residuals(model, x, context, **options):
    hint = torch.rand(len(x), 3, 2 * x.shape[2], 2 * x.shape[3], generator=torch.Generator().manual_seed(1))
    out = model(x, 500, context, hint, **options)
    return {
        "down_block_additional_residuals": out.down_block_res_samples,
        "mid_block_additional_residual": out.mid_block_res_sample,
    }


def inputs(n=2):
    torch.manual_seed(0)
    return torch.randn(n, 4, 16, 16), torch.randn(2 * n, 1, 24)


@torch.no_grad()
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("options", [{}, {"conditioning_scale": 0.7}, {"guess_mode": True}], ids=str)
def test_residuals_of_a_controlnet(unets, options, pooled):
    ours, theirs = unets
    x, context = inputs(4)[0], inputs(2)[1]
    given = residuals(controlnet(ours, global_pool_conditions=pooled), x, context, **options)
    assert near(ours(x, 500, context, **given).sample, theirs(x, 500, context, **given).sample)
    assert not near(ours(x, 500, context, **given).sample, ours(x, 500, context).sample, 1e-2)
    as_list = given | {"down_block_additional_residuals": list(given["down_block_additional_residuals"])}
    assert near(ours(x, 500, context, **as_list).sample, theirs(x, 500, context, **given).sample)


@torch.no_grad()
def test_residuals_of_both_batches_with_several_contexts_per_sample(unets):
    """As the pipeline calls the UNet: b samples with 2 b contexts."""
    ours, theirs = unets
    x, context = inputs()
    twice = x.repeat(2, 1, 1, 1)
    model = controlnet(ours)
    for given in residuals(model, x, context[:2]), residuals(model, twice, context):
        batch = len(given["mid_block_additional_residual"])
        doubled = {
            "down_block_additional_residuals": [
                r.repeat(4 // batch, 1, 1, 1) for r in given["down_block_additional_residuals"]
            ],
            "mid_block_additional_residual": given["mid_block_additional_residual"].repeat(4 // batch, 1, 1, 1),
        }
        expected = theirs(twice, 500, context, **doubled).sample
        assert near(ours(x, 500, context, **given).sample, expected)
        for change in lambda: None, lambda: ours.conv_out.register_forward_hook(lambda *_: None):
            handle = change()  # the fast path, then the plain one
            assert near(make_predictor(ours, TIMES, context)(x, 1, **given), expected)
        handle.remove()


def test_gradients_of_residuals_with_checkpointing(unets):
    ours, theirs = unets
    x, context = inputs()
    model = controlnet(ours)
    gradients = []
    for unet, checkpointing in ((theirs, False), (ours, False), (ours, True)):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        model.zero_grad()
        given = residuals(model, x, context[:2])
        unet.train()(x, 500, context[:2], **given).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for other in gradients[1:]:
        assert all((a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-7 for a, b in zip(other, gradients[0], strict=True))


@torch.no_grad()
def test_residuals_with_deepcache(unets):
    """In a cached step the last skip connection gets its residual: with features of the same step it is exact."""
    ours, _ = unets
    x, context = inputs()
    given = residuals(controlnet(ours), x, context[:2])
    times = torch.tensor([500.0, 500.0, 500.0])
    cached, full = (make_predictor(ours, times, context, cache_interval=n) for n in (2, 1))
    for step in range(3):
        assert near(cached(x, step, **given), full(x, step, **given))


@torch.no_grad()
def test_residuals_that_do_not_fit_are_named(unets):
    ours, _ = unets
    x, context = inputs(2)[0], inputs(1)[1]
    given = residuals(controlnet(ours), x, context)
    down, mid = given.values()
    n = len(down)
    cases = {
        "mid_block_additional_residual: expected both arguments": {"down_block_additional_residuals": down},
        "down_block_additional_residuals: expected both arguments": {"mid_block_additional_residual": mid},
        f"down_block_additional_residuals: expected {n} residuals, one per skip connection, got {n - 1}": given
        | {"down_block_additional_residuals": down[1:]},
        "down_block_additional_residuals: expected a list of tensors, got a tensor": given
        | {"down_block_additional_residuals": mid},
        r"down_block_additional_residuals\[1\]: expected a tensor of shape \(2, .* got a tensor of shape \(3": given
        | {"down_block_additional_residuals": [down[0], torch.cat([down[1], down[1][:1]]), *down[2:]]},
        r"down_block_additional_residuals\[0\]: expected a tensor of shape .* got a tensor": given
        | {"down_block_additional_residuals": [down[0][..., 1:], *down[1:]]},
        "mid_block_additional_residual: expected torch.float32, the dtype": given
        | {"mid_block_additional_residual": mid.double()},
        "down_intrablock_additional_residuals: expected None": {"down_intrablock_additional_residuals": down},
        "cross_attention_kwargs: expected None": given | {"cross_attention_kwargs": {"scale": 0.5}},
    }
    for message, wrong in cases.items():
        with pytest.raises(imvar.InputError, match=message):
            ours(x, 500, context, **wrong)
    ours(x, 500, context, cross_attention_kwargs={}, **given)
