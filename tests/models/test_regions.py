"""Regions: with a token for each region, cross-attention returns the weighted mean of the tokens' outputs, exactly."""

import pytest
import torch
from torch import nn

from imvar import InputError, UNet2DConditionModel, set_attend
from imvar.models.attention import CrossAttention
from imvar.models.regions import RegionLayout, composite, weighted_mean
from imvar.models.unet_blocks import Transformer
from tests.support.random_checkpoint import TINY_UNET

SIZE = (16, 16)
ATTENTION = {"down_blocks.0": 0, "mid_block": 1, "up_blocks.1": 0}


def tokens(n, b=2):
    """Return a context (2 b, n + 1, 24): n tokens and the rest's, under guidance."""
    torch.manual_seed(0)
    conditional = torch.cat([torch.randn(b, n, 24), torch.zeros(b, 1, 24)], dim=1)
    return torch.cat([torch.zeros_like(conditional), conditional])


def layout(*masks, scales=None, size=SIZE):
    return RegionLayout(torch.stack(masks), scales or [1.0] * len(masks), size)


def outputs(value):
    """Return all tensors of precomputed conditioning, without the fused weights."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [out for child in (value if type(value) is list else [value.value]) for out in outputs(child)]


def test_levels_are_those_of_the_blocks_with_attention(pipe):
    assert pipe.unet.attention_levels == ATTENTION
    assert list(pipe.unet.named_blocks.values()) == pipe.unet.blocks
    assert all(pipe.unet.get_submodule(name) is block for name, block in pipe.unet.named_blocks.items())


@torch.no_grad()
def test_the_levels_have_the_sizes_of_the_feature_maps():
    """Also where sizes are odd, and in a UNet of the published depth."""
    depth = {"block_out_channels": (8, 8, 16, 16), "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)}
    up = {"up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3}
    unet, seen = UNet2DConditionModel(**(TINY_UNET | depth | up)), {}
    for name, block in unet.named_blocks.items():
        for transformer in block.transformers:
            transformer.register_forward_hook(
                lambda _, inputs, __, name=name: seen.update({name: tuple(inputs[0].shape[2:])})
            )
    unet(torch.randn(1, 4, 13, 22), 1, torch.randn(1, 1, 24))
    assert seen == {name: (-(-13 // 2**level), -(-22 // 2**level)) for name, level in unet.attention_levels.items()}


def test_later_layers_lie_over_earlier_ones():
    torch.manual_seed(0)
    a, b, c = opacities = torch.rand(3, 5, 7)
    expected = a * (1 - b) * (1 - c), b * (1 - c), c, (1 - a) * (1 - b) * (1 - c)
    assert torch.allclose(composite(opacities), torch.stack(expected), atol=1e-6)
    assert torch.allclose(composite(opacities).sum(0), torch.ones(5, 7))


def test_shares_are_averaged_after_they_are_composed():
    """Two layers that each cover the left half of a cell hide each other; their means do not."""
    left = torch.zeros(16, 16)
    left[:, ::2] = 1
    weights = layout(left, left).weights("mid_block", (8, 8))
    assert torch.equal(weights, torch.tensor([0.0, 0.5, 0.5])[:, None].expand(3, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_mean_of_equal_values_is_that_value(dtype):
    torch.manual_seed(0)
    value, weights = torch.randn(2, 1, 24).to(dtype), torch.rand(3, 10)
    assert torch.equal(weighted_mean([value] * 3, weights / weights.sum(0)), value.expand(2, 10, 24))


@torch.no_grad()
def test_each_position_gets_the_weighted_mean_of_the_outputs(pipe):
    """In each block: for a context of one token, the layers' outputs are linear but for rounding."""
    torch.manual_seed(1)
    context, masks = tokens(2), torch.rand(2, 48, 40)
    scales = [0.7, {"down_blocks.0": 1, "up_blocks.1": 0.3}]
    regions = RegionLayout(masks, scales, SIZE)
    single = [outputs(pipe.unet.precompute_context(context[:, i : i + 1])) for i in range(3)]
    blended = outputs(pipe.unet.precompute_context(context, regions))
    for i, (name, level) in enumerate(ATTENTION.items()):  # one transformer each, but two in the last
        weights = regions.weights(name, (16 >> level, 16 >> level)).float()
        expected = torch.einsum("kn,kbd->bnd", weights, torch.stack([out[i][:, 0] for out in single]))
        assert blended[i].shape == expected.shape
        assert (blended[i] - expected).abs().max() <= 1e-6 * expected.abs().max()


@torch.no_grad()
def test_an_embedding_is_where_its_mask_is(pipe):
    """On the left three quarters of the upper half of an image that is wider than high."""
    mask = torch.zeros(8, 16)
    mask[:4, :12] = 1
    made = outputs(pipe.unet.precompute_context(tokens(2), layout(torch.ones_like(mask), mask, size=(16, 32))))
    below, above = (outputs(pipe.unet.precompute_context(tokens(2)[:, i : i + 1].contiguous())) for i in (0, 1))
    for out, a, b, (h, w) in zip(made[:2], below, above, [(16, 32), (8, 16)], strict=False):
        expected = a.repeat(1, h * w, 1).unflatten(1, (h, w))
        expected[:, : h // 2, : w * 3 // 4] = b[:, None]
        assert (out.unflatten(1, (h, w)) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("masks", "scales"),
    [
        ([torch.ones(1, 1)], [1.0]),
        ([torch.ones(7, 9)], [1.0]),
        ([torch.ones(1, 1)], [dict.fromkeys(ATTENTION, 1)]),
        ([torch.zeros(16, 16), torch.ones(16, 16)], [1.0, 1.0]),
    ],
)
@torch.no_grad()
def test_one_region_for_all_is_the_plain_context(pipe, masks, scales):
    """The same bits, and the same memory."""
    context = tokens(len(masks))
    plain = outputs(pipe.unet.precompute_context(context[:, -2:-1].contiguous()))
    made = outputs(pipe.unet.precompute_context(context, layout(*masks, scales=scales)))
    assert all(map(torch.equal, made, plain))
    assert all(out.shape[1] == 1 for out in made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_same_scale_everywhere_is_a_scaled_token(pipe, dtype):
    """As a context: half the scale is half the embedding, and two halves are the mean of two embeddings."""
    unet, context, full = pipe.unet.to(dtype), tokens(2).to(dtype), torch.ones(1, 1)
    half = unet.precompute_context(context[:, 1:], layout(full, scales=[0.5]))
    assert all(map(torch.equal, outputs(half), outputs(unet.precompute_context(0.5 * context[:, 1:2]))))
    both = unet.precompute_context(context, layout(full, full, scales=[1.0, 0.5]))
    mean = context[:, :1].float() + 0.5 * (context[:, 1:2].float() - context[:, :1].float())
    assert all(map(torch.equal, outputs(both), outputs(unet.precompute_context(mean.to(dtype)))))


@torch.no_grad()
def test_a_token_for_some_blocks_is_the_plain_token_there(pipe):
    context, full = tokens(2), torch.ones(1, 1)
    scales = [{"down_blocks.0": 1}, {"mid_block": 1, "up_blocks.1": 1.0}]
    made = outputs(pipe.unet.precompute_context(context, layout(full, full, scales=scales)))
    first, second = (outputs(pipe.unet.precompute_context(context[:, i : i + 1].contiguous())) for i in (0, 1))
    assert all(map(torch.equal, made, first[:1] + second[1:]))


@pytest.mark.parametrize("name", ["down_blocks.1", "up_blocks.0", "up_blocks.9", "middle"])
def test_a_block_without_attention_is_an_error_that_lists_those_with_it(pipe, name):
    regions = layout(torch.ones(1, 1), scales=[{"mid_block": 1, name: 0.5}])
    message = f"scale: expected blocks with attention: down_blocks.0, mid_block, up_blocks.1, got '{name}'"
    with pytest.raises(InputError, match=message):
        pipe.unet.precompute_context(tokens(1), regions)


def custom_attention(unet):
    class Custom(CrossAttention):
        precomputable = True

    unet.mid_block.attentions[0].transformer_blocks[0].attn2.__class__ = Custom


def custom_transformer(unet):
    class Custom(Transformer):
        precomputable = True

    unet.mid_block.attentions[0].__class__ = Custom


def custom_kernel(unet):
    def mean(q, k, v):
        return v.mean(dim=2, keepdim=True).expand_as(q)

    mean.precomputable = True
    set_attend(unet, mean, CrossAttention)


def no_attention(unet):
    unet.mid_block.attentions[0].transformer_blocks[0].attn2 = nn.Identity()


@pytest.mark.parametrize("change", [custom_attention, custom_transformer, custom_kernel, no_attention])
def test_a_layer_that_is_passed_the_plain_context_is_refused(pipe, change):
    """Although it is declared precomputable: it can do without a plain forward around it, not without its context."""
    change(pipe.unet)
    assert not pipe.unet.why_plain()
    with pytest.raises(InputError, match=r"regions: expected .*, got "):
        pipe.unet.precompute_context(tokens(1), layout(torch.ones(1, 1)))


def test_gradients_reach_the_embeddings_of_regions(pipe):
    context, half = tokens(2).requires_grad_(), torch.zeros(16, 16)
    half[:8] = 1
    made = pipe.unet.precompute_context(context, layout(torch.ones_like(half), half))
    sum(out.square().sum() for out in outputs(made)).backward()
    assert context.grad[2:, :2].abs().amin() > 0


def test_the_published_unet_names_its_blocks():
    with torch.device("meta"):
        unet = UNet2DConditionModel()
    down, up = {f"down_blocks.{i}": i for i in range(3)}, {f"up_blocks.{i}": 3 - i for i in (1, 2, 3)}
    assert unet.attention_levels == down | {"mid_block": 3} | up
