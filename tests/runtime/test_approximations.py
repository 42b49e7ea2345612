"""Approximate ways to be quicker: off unless asked for, and then what their papers say."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn.utils import prune

from imvar import DDIMScheduler, InputError
from imvar.models.ops import Linear
from imvar.runtime import fp8
from imvar.runtime.deepcache import DeepCacheUNet
from imvar.runtime.fp8 import Fp8Linear
from imvar.runtime.precompute import PrecomputedUNet
from tests.support.random_checkpoint import tiny_pipeline


def run(pipe, photo, **options):
    return pipe(
        photo,
        **({"num_inference_steps": 8, "output_type": "latent", "guidance_scale": 3.0} | options),
        generator=torch.Generator().manual_seed(0),
    ).images


@pytest.fixture
def seen(pipe, monkeypatch):
    """How many samples the whole UNet and its last layer were given, call by call."""
    found = []
    levels = pipe.unet.mid_block, pipe.unet.up_blocks[-1].resnets[-1]
    for level in levels:
        forward = type(level).forward

        def watching(module, x, *args, level=level, forward=forward, **kwargs):
            if module is level:
                found.append(("whole", "last")[levels.index(level)] + f" {len(x)}")
            return forward(module, x, *args, **kwargs)

        monkeypatch.setattr(type(level), "forward", watching)
        watching.__module__ = "imvar.models"  # or it would count as somebody else's
    return found


def test_the_defaults_change_nothing(pipe, photo):
    assert torch.equal(run(pipe, photo), run(pipe, photo, guidance_interval=(0.0, 1.0), cache_interval=1))


@pytest.mark.parametrize(
    ("interval", "guided"),
    [
        ((0.25, 0.75), (2, 3, 4, 5)),
        ((0, 0.5), (0, 1, 2, 3)),
        ([0.5, 1], (4, 5, 6, 7)),
        ((0.5, 0.5), ()),
        ((0, 1), range(8)),
    ],
)
def test_guidance_in_an_interval_is_a_scale_that_depends_on_the_step(pipe, photo, interval, guided, seen):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    made = run(pipe, photo, guidance_interval=interval)
    assert [entry for entry in seen if "whole" in entry] == [f"whole {2 if i in guided else 1}" for i in range(8)]

    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(8)
    context = pipe._encode_image(photo, torch.device("cpu"), 1, True).detach()
    x = torch.randn(made.shape, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            uncond, cond = pipe.unet(x.repeat(2, 1, 1, 1), t, context).sample.chunk(2)
        x = scheduler.step(uncond + (3.0 if i in guided else 1.0) * (cond - uncond), t, x).prev_sample
    assert (made - x).abs().max() <= 1e-5 * x.abs().max()


def test_the_whole_unet_runs_in_every_so_many_th_step(pipe, photo, seen):
    exact = run(pipe, photo, num_inference_steps=7)
    seen.clear()
    made = run(pipe, photo, num_inference_steps=7, cache_interval=3)
    assert [entry.split()[0] for entry in seen] == ["whole", "last", "last", "last"] * 2 + ["whole", "last", "last"]
    assert made.shape == exact.shape
    assert made.isfinite().all()
    assert not torch.allclose(made, exact, atol=1e-4)


@pytest.mark.parametrize("each", [1, 2])
@torch.no_grad()
def test_the_last_layer_completes_the_unet(pipe, each):
    """Told the same latents and time, the kept features give what the whole UNet gives."""
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    times, context, x = torch.linspace(981, 500, 4), torch.randn(2 * each, 1, 24), torch.randn(2, 4, 8, 8)
    cached, whole = DeepCacheUNet(pipe.unet, times, context, 3), PrecomputedUNet(pipe.unet, times, context)
    for _ in range(3):
        assert (cached(x, 0) - whole(x, 0)).abs().max() <= 1e-6 * whole(x, 0).abs().max()
    other = torch.randn(2, 4, 8, 8)
    assert torch.equal(cached(other, 3), whole(other, 3))


def test_a_guided_and_an_unguided_run_keep_their_own_features(pipe, photo, seen):
    run(pipe, photo, guidance_interval=(0.5, 1), cache_interval=2, num_inference_steps=7)  # 8 calls under PNDM
    assert [entry for entry in seen if "whole" in entry] == ["whole 1", "whole 1", "whole 2", "whole 2"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"guidance_interval": 0.5}, "guidance_interval: expected .*, got 0.5"),
        ({"guidance_interval": (0.1, 0.5, 0.9)}, "guidance_interval"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval: expected the lower fraction first"),
        ({"guidance_interval": (-0.1, 1)}, "guidance_interval: expected a number from 0 to 1, got -0.1"),
        ({"guidance_interval": (0, float("nan"))}, "guidance_interval: expected a number from 0 to 1, got nan"),
        ({"guidance_interval": ("a", 1)}, "guidance_interval: expected a number from 0 to 1, got 'a'"),
        ({"cache_interval": 0}, "cache_interval: expected an integer >= 1, got 0"),
        ({"cache_interval": 1.5}, "cache_interval: expected an integer >= 1, got 1.5"),
    ],
)
def test_bad_values_are_named(pipe, photo, options, says):
    with pytest.raises(InputError, match=says.replace("(", r"\(")):
        run(pipe, photo, **options)


def test_features_of_a_unet_that_somebody_watches_are_not_kept(pipe, photo):
    pipe.unet.conv_in.register_forward_hook(lambda *_: None)
    run(pipe, photo)
    with pytest.raises(InputError, match="cache_interval: expected 1, got 2"):
        run(pipe, photo, cache_interval=2)


# Eight bits


def test_eight_bits_round_a_little_and_are_undone(pipe, photo):
    exact, names = run(pipe, photo), list(pipe.unet.state_dict())
    pipe.enable_fp8()
    pipe.enable_fp8()  # again, which changes nothing
    layers = [layer for layer in pipe.unet.modules() if isinstance(layer, Fp8Linear)]
    assert len(layers) == 6 * 4  # four of self-attention and two of feed-forward, of four transformer blocks
    assert list(pipe.unet.state_dict()) == names
    rounded = run(pipe, photo)
    assert 1e-4 < (rounded - exact).abs().mean() / exact.abs().mean() < 0.2
    pipe.disable_fp8()
    assert torch.equal(run(pipe, photo), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_product_in_eight_bits_is_near_the_exact_one(dtype):
    torch.manual_seed(0)
    layer, x = Linear(320, 64).to(dtype), (torch.randn(2, 50, 320) * torch.logspace(-3, 3, 50)[:, None]).to(dtype)
    made, expected = Fp8Linear.from_layer(layer)(x), layer(x)
    assert made.dtype == dtype
    assert made.shape == expected.shape
    error = (made - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
    assert error.max() <= 0.1  # of every row, however small: each has a scale of its own
    zero = Fp8Linear.from_layer(layer)(torch.zeros_like(x))
    assert torch.equal(zero, layer.bias.expand_as(zero))


def test_weights_that_are_moved_or_loaded_are_rounded_anew():
    layer = Linear(32, 16)
    eight = Fp8Linear.from_layer(layer)
    other = Fp8Linear.from_layer(Linear(32, 16))
    x = torch.randn(5, 32)
    with torch.no_grad():
        assert not torch.equal(eight(x), other(x))
        eight.load_state_dict(other.state_dict())
        assert torch.equal(eight(x), other(x))
        for layer in (eight, other):
            layer.weight.mul_(3)  # as an optimizer does, or what fuses LoRA
        assert torch.equal(eight(x), Fp8Linear.from_layer(eight.to_layer())(x))
    assert eight.to(torch.bfloat16).quantized[0].dtype == torch.float8_e4m3fn
    assert eight.to_layer().weight is eight.weight
    assert eight(torch.randn(3, 32, dtype=torch.bfloat16, requires_grad=True)).requires_grad


def test_layers_of_odd_sizes_stay_exact():
    layer = Linear(24, 16)
    assert Fp8Linear.from_layer(layer) is layer


def test_a_gpu_that_cannot_is_named(pipe, monkeypatch):
    on_cuda = type("P", (), {"device": torch.device("cuda")})
    monkeypatch.setattr(fp8, "first_parameter", lambda *_: on_cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(InputError, match=r"expected a GPU of compute capability 8\.9 or higher, got NVIDIA A100"):
        pipe.enable_fp8()


def test_eight_bits_leave_the_layers_of_others(pipe, photo):
    """Classes of a fork, layers that are watched or pruned; a pipeline in eight bits can be copied and pickled."""

    class Louder(Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    block = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    old = block.ff.net[2]
    block.ff.net[2] = louder = Louder(old.in_features, old.out_features)
    seen = []
    block.ff.net[0].proj.register_forward_hook(lambda *_: seen.append(1))
    prune.identity(block.attn1.to_q, "weight")
    pipe.enable_fp8()
    assert block.ff.net[2] is louder
    assert type(block.attn1.to_k) is Fp8Linear
    assert type(block.attn1.to_q) is Linear
    run(pipe, photo)
    assert seen
    pipe.disable_fp8()
    assert block.ff.net[2] is louder
    plain = tiny_pipeline()
    plain.set_progress_bar_config(disable=True)
    plain.enable_fp8()
    expected = run(plain, photo)
    for twin in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert torch.equal(run(twin, photo), expected)


def test_features_are_never_older_than_the_interval(pipe, photo, monkeypatch):
    """Also where guidance ends and begins again: 8 would otherwise meet what the whole UNet found in step 0."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    whole, plain = [], DeepCacheUNet.__call__

    def watched(self, x, step):
        before = self.last_full_step
        sample = plain(self, x, step)
        assert 0 <= step - self.last_full_step < 5
        whole.extend([step] if self.last_full_step != before else [])
        return sample

    monkeypatch.setattr(DeepCacheUNet, "__call__", watched)
    run(pipe, photo, num_inference_steps=10, cache_interval=5, guidance_interval=(0.2, 0.8))
    assert whole == [0, 2, 7, 8]


def test_whoever_merges_in_place_spoils_nothing_that_is_kept(pipe, photo):
    images = []
    for merge in (
        lambda h, skip, level: torch.cat([h * 1.1, skip], dim=1),
        lambda h, skip, level: torch.cat([h.mul_(1.1), skip], dim=1),
    ):
        pipe.unet.merge = merge
        images.append(run(pipe, photo, cache_interval=3))
    assert (images[0] - images[1]).abs().max() < 1e-4


def test_what_cannot_be_left_out_is_said_before_any_network_runs(pipe, photo):
    pipe.unet.conv_in.register_forward_hook(lambda *_: None)
    pipe.image_encoder.register_forward_pre_hook(lambda *_: pytest.fail("the encoder ran"))
    with pytest.raises(InputError, match=r"cache_interval: expected 1, got 2; above 1 it requires"):
        run(pipe, photo, cache_interval=2)


def test_shares_of_any_kind_of_number(pipe, photo):
    assert torch.equal(
        run(pipe, photo, guidance_interval=(torch.tensor(0.25), np.float64(1))),
        run(pipe, photo, guidance_interval=(0.25, 1)),
    )
