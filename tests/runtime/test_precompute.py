"""A run's UNet is prepared once and called with latents alone: the same answer, for less work."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from imvar import DDIMScheduler, LMSDiscreteScheduler, PNDMScheduler, set_attend
from imvar.models import ResnetBlock, SelfAttention
from imvar.models.ops import Conv2d, Linear
from imvar.models.stock import is_unmodified
from imvar.runtime.denoiser import Denoiser, make_predictor
from imvar.runtime.precompute import PrecomputedUNet
from tests.support.random_checkpoint import PUBLISHED_SCHEDULER, tiny_pipeline

TIMES = torch.tensor([981.0, 500.5, 1.0])
SHAPES = [(1, 8, 8), (2, 8, 8), (3, 7, 5)]


def near(a, b):
    return (a - b).abs().max() <= 1e-5 * b.abs().max()


def random_context(n, tokens=1, each=2):
    torch.manual_seed(0)
    return torch.cat([torch.zeros(n, tokens, 24), *torch.randn(each - 1, n, tokens, 24)])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("each", [1, 2, 3])
@pytest.mark.parametrize(("n", "h", "w"), SHAPES)
@torch.no_grad()
def test_equals_the_plain_call(pipe, n, h, w, each, tokens):
    x, context = torch.randn(n, 4, h, w), random_context(n, tokens, each)
    prepared = PrecomputedUNet(pipe.unet, TIMES, context)
    for step, t in enumerate(TIMES):
        plain = pipe.unet(x.repeat(each, 1, 1, 1), t, context).sample
        assert near(prepared(x, step), plain)


@torch.no_grad()
def test_equals_the_plain_call_under_freeu_and_slicing(pipe):
    x, context = torch.randn(2, 4, 8, 8), random_context(2)
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    pipe.enable_attention_slicing("max")
    assert near(
        PrecomputedUNet(pipe.unet, TIMES, context)(x, 1), pipe.unet(x.repeat(2, 1, 1, 1), TIMES[1], context).sample
    )


@torch.no_grad()
def test_a_step_works_out_nothing_that_the_run_knows(pipe, monkeypatch):
    prepared, seen = PrecomputedUNet(pipe.unet, TIMES, random_context(3)), []
    names = {module: name for name, module in pipe.unet.named_modules()}
    for kind in Linear, nn.Linear, Conv2d:

        def watching(self, x, kind=kind, forward=kind.forward):
            seen.append((names[self], len(x)))
            return forward(self, x)

        monkeypatch.setattr(kind, "forward", watching)
    prepared(torch.randn(3, 4, 8, 8), 0)
    batches = dict(seen)
    assert not [name for name in batches if "time" in name or "attn2" in name]
    assert (
        batches["conv_in"] == batches["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"] == 3
    )  # for both halves
    assert batches["down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"] == batches["conv_out"] == 6


def test_who_watches_layers_sees_every_call_as_it_was(photo):
    """A hook, an override, a kernel or a layer of one's own: each sees both halves and what it is otherwise given."""

    def hooked(unet, see):
        unet.down_blocks[0].resnets[0].register_forward_hook(
            lambda layer, inputs, out: see(inputs[0]) or see(inputs[1])
        )

    def overridden(unet, see):
        forward = unet.conv_in.forward
        unet.conv_in.forward = lambda x: (see(x), forward(x))[1]

    def kernel(unet, see):
        unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.attend = lambda q, k, v: (see(q), v)[1]

    def layer(unet, see):
        class Mine(ResnetBlock):
            def forward(self, x, temb=None):
                see(x)
                see(temb)
                return super().forward(x, temb)

        block = unet.down_blocks[0].resnets[0]
        block.__class__ = Mine

    def attention(unet, see):
        class Mine(SelfAttention):
            def attend_heads(self, q, k, v):
                see(q)
                return super().attend_heads(q, k, v)

        unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.__class__ = Mine

    for change in hooked, overridden, kernel, layer, attention:
        pipe, seen = tiny_pipeline(), []
        pipe.set_progress_bar_config(disable=True)
        assert is_unmodified(pipe.unet)
        change(pipe.unet, lambda x, seen=seen: seen.append(len(x)))
        assert not is_unmodified(pipe.unet)
        pipe(photo, num_inference_steps=2, output_type="latent")
        assert set(seen) == {2}, change.__name__


def test_offloading_is_no_watching(pipe):
    pipe.enable_model_cpu_offload(device="cpu")
    assert is_unmodified(pipe.unet)


def test_gradients_are_those_of_the_plain_call(pipe):
    x, context = torch.randn(2, 4, 8, 8), random_context(2)
    found = []
    for predict in (
        lambda: pipe.unet(x.repeat(2, 1, 1, 1), 500, context).sample,
        lambda: pipe.unet(x, torch.tensor([500, 500]), context).sample,
    ):
        pipe.unet.zero_grad()
        predict().square().mean().backward()
        found.append([p.grad.clone() for p in pipe.unet.parameters()])
    assert all((a - b).abs().max() <= 1e-5 * a.abs().max().clamp(min=1e-3) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [DDIMScheduler, PNDMScheduler, LMSDiscreteScheduler])
@pytest.mark.parametrize("guided", [True, False])
@torch.no_grad()
def test_no_step_waits_for_the_device(pipe, kind, guided):
    """On the meta device there is nothing to wait for: whoever asks for a value there gets an error."""
    scheduler = kind.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(6)
    unet, context = pipe.unet.to("meta"), torch.empty(1 + guided, 1, 24, device="meta")
    times = torch.empty(len(scheduler.timesteps), device="meta")
    options = {"guidance_scale": 3.0, "guidance_interval": (0.0, 0.5)} if guided else {}
    denoiser = Denoiser(lambda: unet, partial(make_predictor, unet), times, context, **options)
    x = torch.empty(1, 4, 8, 8, device="meta") * scheduler.init_noise_sigma
    with pytest.raises(RuntimeError, match="meta"):
        x.sum().item()
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(denoiser(scheduler.scale_model_input(x, t), i), t, x).prev_sample
    assert x.shape == (1, 4, 8, 8)


def made(pipe, photo, **options):
    return pipe(
        photo,
        **({"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 3.0} | options),
        generator=torch.Generator().manual_seed(0),
    ).images


@pytest.mark.parametrize("kind", ["pruned", "weight_norm", "parametrized", "no name", "every layer"])
def test_weights_and_hooks_of_others_are_what_they_are_at_every_call(pipe, photo, kind):
    attn, handles = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1, []
    if kind == "pruned":
        prune.identity(attn.to_q, "weight")
        weight = attn.to_q.weight_orig
    elif kind == "weight_norm":
        with pytest.warns(FutureWarning):
            torch.nn.utils.weight_norm(attn.to_q)
        weight = attn.to_q.weight_v
    elif kind == "parametrized":
        torch.nn.utils.parametrizations.weight_norm(attn.to_q)
        weight = attn.to_q.parametrizations.weight.original1
    elif kind == "no name":
        handles.append(pipe.unet.conv_in.register_forward_pre_hook({}.setdefault))
    else:
        handles.append(torch.nn.modules.module.register_module_forward_hook(lambda *_: None))
    try:
        assert not is_unmodified(pipe.unet)
        before = made(pipe, photo)
        if kind in ("pruned", "weight_norm", "parametrized"):
            weight.data.mul_(-torch.arange(1.0, 1 + len(weight))[:, None])
            assert (made(pipe, photo) - before).abs().max() > 1e-3
    finally:
        for handle in handles:
            handle.remove()


CHANGES = {
    "all weights": lambda p: [weight.mul_(1.3) for weight in p.unet.parameters()],
    "loaded": lambda p: p.unet.load_state_dict(tiny_pipeline(seed=7).unet.state_dict()),
    "queries": lambda p: p.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.mul_(-3),
    "answers": lambda p: p.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight.mul_(-3),
    "time": lambda p: p.unet.time_embedding.linear_1.weight.mul_(-3),
    "kernel": lambda p: set_attend(p.unet, lambda q, k, v: v.mean(dim=2, keepdim=True).expand_as(q)),
    "another": lambda p: setattr(p, "unet", tiny_pipeline(seed=7).unet),
    "freeu": lambda p: p.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "a layer": lambda p: setattr(p.unet.mid_block.resnets[0], "conv1", nn.Conv2d(32, 32, 3, padding=1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", [DDIMScheduler, PNDMScheduler])
def test_what_a_callback_changes_counts_from_the_next_step(pipe, photo, change, kind):
    """As where nothing is prepared, since somebody watches."""

    def run(watched):
        p = tiny_pipeline()
        p.set_progress_bar_config(disable=True)
        p.scheduler = kind(**PUBLISHED_SCHEDULER if kind is PNDMScheduler else {"clip_sample": False})
        if watched:
            p.unet.conv_out.register_forward_pre_hook(lambda *_: None)

        def callback(i, t, latents):
            if i == 1:
                torch.manual_seed(0)
                change(p)

        return made(p, photo, callback=callback)

    quick, plain = run(False), run(True)
    assert (quick - plain).abs().max() <= 1e-4 * plain.abs().max()


def test_watching_costs_nothing_where_nobody_is_called_back(pipe, photo, monkeypatch):
    monkeypatch.setattr("imvar.runtime.denoiser.Fingerprint", lambda _: pytest.fail("watched"))
    made(pipe, photo)


def test_times_that_are_traced_have_no_value(pipe):
    from torch.fx.experimental.proxy_tensor import make_fx

    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([5, 7]), torch.randn(2, 1, 24)
    with torch.no_grad():
        traced = make_fx(lambda x, t, h: pipe.unet(x, t, h).sample)(x, t, context)
        assert torch.allclose(traced(x, t, context), pipe.unet(x, t, context).sample, atol=1e-5)
