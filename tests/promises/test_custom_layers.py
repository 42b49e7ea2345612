"""Any layer may be replaced, patched or watched: the pipeline's fast paths equal the plain call or are not taken."""

import copy
import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import imvar
from imvar.models import CrossAttention, ResnetBlock, SelfAttention
from imvar.runtime.denoiser import Denoiser, can_precompute, make_predictor

TIMES = torch.tensor([981.0, 500.0, 1.0])


def inputs(samples=2):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(n, *shape, generator=generator) for n, shape in ((samples, (4, 8, 8)), (2 * samples, (1, 24))))


def plain(unet, step=1):
    """The output of the plain call; None where it fails."""
    x, context = inputs()
    try:
        return unet(x.repeat(2, 1, 1, 1), TIMES[step], context).sample
    except (TypeError, RuntimeError, AttributeError, ValueError, NotImplementedError):
        return None


def quick(unet, step=1, **options):
    """The output of the function that the pipeline calls."""
    x, context = inputs()
    return make_predictor(unet, TIMES, context, **options)(x, step)


def near(a, b):
    return (a - b).abs().max() <= 1e-4 * b.abs().max()


def places(unet):
    """One layer for each class of parent, name and class of layer."""
    found = {}
    for path, parent in unet.named_modules():
        for name, layer in parent.named_children():
            found.setdefault((type(parent), "" if name.isdigit() else name, type(layer)), (path, name))
    return found.values()


class Opaque(nn.Module):
    """A layer that hides another."""

    def __init__(self, layer):
        super().__init__()
        self.inner = layer

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class OpaquePrecomputable(Opaque):
    precomputable = True


def scaled(layer, **attributes):
    """The layer as a subclass that scales its output."""

    def forward(self, *args, **kwargs):
        out = super(kind, self).forward(*args, **kwargs)
        return 1.1 * out if isinstance(out, torch.Tensor) else out

    kind = type(f"Scaled{type(layer).__name__}", (type(layer),), {"forward": forward, **attributes})
    layer = copy.copy(layer)
    layer.__class__ = kind
    return layer


KINDS = {
    "sequential": lambda layer: nn.Sequential(layer, nn.Dropout(0.0)),
    "identity": lambda layer: nn.Identity(),
    "opaque": Opaque,
    "opaque, precomputable": OpaquePrecomputable,
    "subclass": scaled,
    "subclass, precomputable": lambda layer: scaled(layer, precomputable=True),
    "dropout": lambda layer: nn.Sequential(layer, nn.Dropout(0.5)).train(),
}


@torch.no_grad()
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_where_the_plain_call_works_the_pipeline_returns_the_same(pipe, make):
    run = 0
    for path, name in places(pipe.unet):
        unet = copy.deepcopy(pipe.unet)
        parent = unet.get_submodule(path)
        setattr(parent, name, make(getattr(parent, name)))
        torch.manual_seed(0)
        expected = plain(unet)
        if expected is not None:
            torch.manual_seed(0)
            assert near(quick(unet), expected), f"{path}.{name}"
            run += 1
    assert run > 20


def patch(owner, name, bind=False):
    """Replace a method by one that scales its output, disguised by functools.wraps."""
    method = getattr(type(owner) if bind else owner, name)

    @functools.wraps(method)
    def patched(self, *args, **kwargs):
        out = method(self, *args, **kwargs)
        return out * 1.1 if isinstance(out, torch.Tensor) else type(out)(1.1 * t for t in out)

    return types.MethodType(patched, owner) if bind else patched


METHODS = [
    ("mid_block.attentions.0.transformer_blocks.0.attn1", "project_qkv"),
    ("mid_block.attentions.0.transformer_blocks.0.attn1", "project_out"),
    ("mid_block.attentions.0.transformer_blocks.0.attn2", "attend_heads"),
    ("mid_block.attentions.0.transformer_blocks.0", "attend_to"),
    ("mid_block.resnets.0", "project"),
    ("mid_block", "layer"),
    ("up_blocks.0.upsamplers.0.conv", "_conv_forward"),
    ("conv_in", "forward"),
]


@torch.no_grad()
@pytest.mark.parametrize(("path", "name"), METHODS)
@pytest.mark.parametrize("of_class", [False, True], ids=["instance", "class"])
def test_a_patched_method_is_noticed(pipe, monkeypatch, path, name, of_class):
    layer, before = pipe.unet.get_submodule(path), plain(pipe.unet)
    owner = next(kind for kind in type(layer).__mro__ if name in vars(kind)) if of_class else layer
    monkeypatch.setattr(owner, name, patch(owner, name, bind=not of_class))
    expected = plain(pipe.unet)
    assert not near(expected, before)
    assert near(quick(pipe.unet), expected)
    reason = f"{owner.__name__}.{name} was replaced" if of_class else f"{path}: its own {name}"
    assert any(reason in line for line in pipe.unet.why_plain())


@torch.no_grad()
def test_a_method_that_a_callback_patches_counts_from_the_next_step(pipe):
    x, context = inputs(1)
    attn = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    denoiser = Denoiser(lambda: pipe.unet, lambda *a, **o: make_predictor(pipe.unet, *a, **o), TIMES, context)
    denoiser.refreshable = True
    denoiser.prepare()
    assert not denoiser.refresh()
    attn.project_qkv = patch(attn, "project_qkv", bind=True)
    assert denoiser.refresh()
    assert near(denoiser(x, 1), pipe.unet(x.repeat(2, 1, 1, 1), TIMES[1], context).sample)


def test_why_plain_names_layers_and_reasons(pipe):
    unet = pipe.unet
    assert unet.why_plain() == []
    up = unet.up_blocks[1]
    up.resnets[0].__class__ = type("GatedBlock", (ResnetBlock,), {})
    up.attentions[0].transformer_blocks[0].attn1.attend = lambda q, k, v: v
    up.attentions[1].register_forward_hook(lambda *_: None)
    unet.down_blocks[0].resnets[0].forward = lambda x, temb: x
    torch.nn.utils.parametrizations.weight_norm(unet.conv_in)
    unet.mid_block.resnets[0].dropout = nn.Dropout(0.1).train()
    reasons = dict(line.split(": ", 1) for line in unet.why_plain())
    assert reasons == {
        "conv_in": "a parametrized weight",
        "down_blocks.0.resnets.0": "its own forward",
        "mid_block.resnets.0.dropout": "Dropout in training mode",
        "up_blocks.1.resnets.0": "GatedBlock is a custom class",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1": "<lambda> is a custom kernel",
        "up_blocks.1.attentions.1": "a hook",
    }


class RowScale(nn.Module):
    """A kernel with a parameter, on each row of the batch on its own."""

    precomputable = True

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(self.scale * q, k, v)


class CountingAttention(SelfAttention):
    precomputable = True

    def project_qkv(self, hidden_states, context):
        self.batches.append(len(hidden_states))
        q, k, v = super().project_qkv(hidden_states, context)
        return 2 * q, k, v


@torch.no_grad()
def test_a_precomputable_layer_or_kernel_keeps_the_fast_path(pipe, photo):
    unet = pipe.unet
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.attn1.__class__, block.attn1.batches = CountingAttention, []
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.attend = RowScale()
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.attend = RowScale()
    unet.up_blocks[1].resnets[1] = scaled(unet.up_blocks[1].resnets[1], precomputable=True)
    assert unet.why_plain() == []
    assert can_precompute(unet)
    assert near(quick(unet), plain(unet))
    assert block.attn1.batches == [2, 4]  # the fast path shares what comes before the first context
    for interval in (1, 2):
        images = pipe(photo, num_inference_steps=3, output_type="pt", cache_interval=interval, seed=0).images
        assert images.isfinite().all()


@torch.no_grad()
def test_a_block_with_its_own_forward_is_not_precomputed(pipe, photo):
    pipe.unet.mid_block = OpaquePrecomputable(pipe.unet.mid_block)
    assert "OpaquePrecomputable has its own forward" in pipe.unet.why_plain()[0]
    assert near(quick(pipe.unet), plain(pipe.unet))
    with pytest.raises(imvar.InputError, match="cache_interval"):
        pipe(photo, num_inference_steps=2, cache_interval=2)


class MLP(nn.Module):
    """A time embedding and a cross-attention that have nothing of imvar's."""

    def __init__(self, width, out):
        super().__init__()
        self.proj = nn.Linear(width, out)

    def forward(self, x, encoder_hidden_states=None):
        out = self.proj(x)
        return out if encoder_hidden_states is None else out + encoder_hidden_states.mean()


@torch.no_grad()
def test_layers_that_share_no_attribute_with_the_old_ones(pipe, photo):
    pipe.unet.time_embedding = MLP(16, 64)
    imvar.replace_layers(pipe.unet, CrossAttention, lambda layer: MLP(layer.dim, layer.dim))
    assert near(quick(pipe.unet), plain(pipe.unet))
    assert pipe(photo, num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_a_model_unwrapped_by_accelerate_is_stock_again(pipe):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(pipe.unet)
    assert not can_precompute(prepared)
    unet = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert "forward" in vars(unet)
    assert unet.why_plain() == []
    unet.forward = copy.deepcopy(unet).forward  # of another model
    assert unet.why_plain() != []


def test_a_merge_runs_once_per_forward_under_gradient_checkpointing(pipe):
    x, context = inputs()
    gradients = []
    for checkpointing in (False, True):
        unet, weights = copy.deepcopy(pipe.unet).train(), [0.1, 0.2, 0.3, 0.4]
        unet.merge = lambda h, skip, level, left=weights: torch.cat([h, skip * left.pop()], dim=1)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(x.repeat(2, 1, 1, 1), 5, context).sample.square().mean().backward()
        assert weights == []
        gradients.append([p.grad for p in unet.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_gradient_checkpointing_recomputes_every_block(pipe):
    unet, (x, context), calls = pipe.unet.train(), inputs(), []
    for block in unet.blocks:
        block.resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for switch, times in ((lambda: None, 1), (unet.enable_gradient_checkpointing, 2)):
        switch()
        calls.clear()
        unet(x.repeat(2, 1, 1, 1), 5, context).sample.mean().backward()
        assert len(calls) == times * len(unet.blocks)
    assert unet.is_gradient_checkpointing
    unet.disable_gradient_checkpointing()
    assert not unet.is_gradient_checkpointing


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_replacement_of_torchs_attention_is_called(pipe, monkeypatch, tokens):
    """As packages of faster attention kernels do it."""
    generator, calls, attend = torch.Generator().manual_seed(0), [], F.scaled_dot_product_attention
    x, context = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (tokens, 24)))
    before = pipe.unet(x, 5, context).sample

    def replacement(q, k, v, **options):
        calls.append(q.shape)
        return 0.5 * attend(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", replacement)
    pipe.unet.set_attention_slice("max") if tokens > 1 else None
    expected = pipe.unet(x, 5, context).sample
    assert len(calls) == 8
    assert not near(expected, before)
    assert near(make_predictor(pipe.unet, TIMES, context)(x, 1), pipe.unet(x, TIMES[1], context).sample)
    assert "replacement is a custom kernel" in pipe.unet.why_plain()[0]
