"""A run with regions: masks that divide one embedding leave the bits of the plain run, in each way to run a UNet."""

from functools import partial

import pytest
import torch

from imvar import InputError
from imvar.models.regions import RegionLayout
from imvar.runtime.compiled import Compiler
from imvar.runtime.deepcache import DeepCacheUNet
from imvar.runtime.denoiser import Denoiser, make_predictor
from imvar.runtime.precompute import PrecomputedUNet
from tests.support.random_checkpoint import tiny_pipeline

TIMES = torch.tensor([981.0, 500.5, 1.0])
SIZES = [(16, 16), (5, 16), (9, 7), (12, 8)]


def context(b, *embeds):
    """Return a context under guidance, (2 b, m, 24): a token for each of the embeddings (24,), then the rest's."""
    conditional = torch.stack([*embeds, torch.zeros(24)]).expand(b, -1, -1)
    return torch.cat([torch.zeros_like(conditional), conditional])


def embeddings(n):
    torch.manual_seed(0)
    return torch.randn(n, 24).unbind()


def dividing_masks(h, w):
    """Return masks that together cover an image of 8 h x 8 w pixels."""
    left = torch.zeros(h, w)
    left[:, : w // 2] = 1
    ragged = (torch.rand(8 * h, 8 * w) < 0.5).float()
    return {
        "full": torch.ones(1, 1, 1),
        "halves": torch.stack([left, 1 - left]),
        "ragged": torch.stack([ragged, 1 - ragged]),
        "soft": torch.stack([torch.ones(3 * h, w), torch.rand(3 * h, w)]),
    }


def divided(embed, b, masks, size):
    """Return a context in which all regions have one embedding, and their layout."""
    return context(b, *[embed] * len(masks)), RegionLayout(masks, [1.0] * len(masks), size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["full", "halves", "ragged", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_masks_that_divide_one_embedding_change_no_bit(pipe, size, kind, dtype):
    (embed,), unet = embeddings(1), pipe.unet.to(dtype)
    x, (tokens, regions) = torch.randn(2, 4, *size, dtype=dtype), divided(embed, 2, dividing_masks(*size)[kind], size)
    plain = PrecomputedUNet(unet, TIMES, context(2, embed)[:, :1].contiguous().to(dtype))
    regional = PrecomputedUNet(unet, TIMES, tokens.to(dtype), regions=regions)
    assert all(torch.equal(regional(x, step), plain(x, step)) for step in range(len(TIMES)))


@pytest.mark.parametrize("kind", ["halves", "soft"])
@torch.no_grad()
def test_also_with_deepcache_and_slicing(pipe, kind):
    (embed,), x = embeddings(1), torch.randn(3, 2, 4, 5, 16)
    tokens, regions = divided(embed, 2, dividing_masks(5, 16)[kind], (5, 16))
    pipe.unet.set_attention_slice("max")
    plain = DeepCacheUNet(pipe.unet, TIMES, context(2, embed)[:, :1].contiguous(), 2)
    regional = DeepCacheUNet(pipe.unet, TIMES, tokens, 2, regions=regions)
    assert all(torch.equal(regional(x[i], i), plain(x[i], i)) for i in range(3))


@torch.no_grad()
def test_the_conditional_half_alone_has_the_same_regions(pipe):
    """In an interval of guidance, whose other steps run the conditional half alone."""
    a, b = embeddings(2)
    masks = torch.rand(2, 16, 16)
    tokens, regions = context(2, a, b), RegionLayout(masks, [1.0, 0.5], (16, 16))
    options = {"guidance_scale": 3.0, "guidance_interval": (0.0, 0.5), "regions": regions}
    denoiser = Denoiser(lambda: pipe.unet, partial(make_predictor, pipe.unet), TIMES, tokens, **options)
    whole, x = PrecomputedUNet(pipe.unet, TIMES, tokens, regions=regions), torch.randn(2, 4, 16, 16)
    for step, guided in enumerate([True, True, False]):
        uncond, cond = whole(x, step).chunk(2)
        expected = uncond + 3.0 * (cond - uncond) if guided else cond
        assert (denoiser(x, step) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_weights_that_change_during_a_run_count_for_regions(pipe):
    (a, b), x = embeddings(2), torch.randn(1, 4, 16, 16)
    tokens, regions = context(1, a, b), RegionLayout(dividing_masks(16, 16)["halves"], [1.0, 1.0], (16, 16))
    options = {"refreshable": True, "regions": regions}
    denoiser = Denoiser(
        lambda: pipe.unet, lambda *args, **more: make_predictor(pipe.unet, *args, **more), TIMES, tokens, **options
    )
    pipe.unet = tiny_pipeline(seed=7).unet.to(torch.bfloat16)
    assert denoiser.refresh()
    assert denoiser.context.dtype == torch.bfloat16
    x = x.to(torch.bfloat16)
    expected = PrecomputedUNet(pipe.unet, TIMES, tokens.to(torch.bfloat16), regions=regions)(x, 1)
    assert torch.equal(denoiser(x, 1), expected)


@torch.no_grad()
def test_a_hook_that_is_added_during_a_run_is_refused(pipe):
    (embed,) = embeddings(1)
    tokens, regions = divided(embed, 1, dividing_masks(16, 16)["halves"], (16, 16))
    predictor = partial(make_predictor, pipe.unet)
    denoiser = Denoiser(lambda: pipe.unet, predictor, TIMES, tokens, refreshable=True, regions=regions)
    pipe.unet.conv_in.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match=r"regions: expected .*, got conv_in: a hook"):
        denoiser.refresh()


def test_a_unet_that_cannot_be_precomputed_is_refused(pipe):
    (embed,) = embeddings(1)
    tokens, regions = divided(embed, 1, dividing_masks(16, 16)["full"], (16, 16))
    with pytest.raises(InputError, match=r"regions: expected imvar's own UNet2DConditionModel .*, got Identity"):
        make_predictor(torch.nn.Identity(), TIMES, tokens, regions=regions)


def test_a_predictor_without_regions_is_called_as_ever(pipe):
    (embed,) = embeddings(1)
    seen = []

    def predictor(timesteps, context, **more):
        seen.append(more.keys())
        return make_predictor(pipe.unet, timesteps, context, **more)

    Denoiser(lambda: pipe.unet, predictor, TIMES, context(1, embed)[:, :1])
    assert seen == [{"cache_interval", "packed"}]


@torch.no_grad()
def test_compiled_steps_take_the_regions_as_inputs(pipe):
    """So other masks, and other embeddings, run the same graph."""
    a, b = embeddings(2)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    runner, x = Compiler(backend=backend), torch.randn(1, 4, 16, 16)
    for masks in torch.rand(3, 2, 16, 16).unbind():
        regions = RegionLayout(masks, [1.0, 0.5], (16, 16))
        for tokens in context(1, a, b), context(1, b, a):
            made = PrecomputedUNet(pipe.unet, TIMES, tokens, runner, regions=regions)(x, 1)
            plain = PrecomputedUNet(pipe.unet, TIMES, tokens, regions=regions)(x, 1)
            assert (made - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert len(graphs) == 1
