"""`image_embeds` of regions: embeddings that vary over the image and over the blocks of the UNet."""

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from imvar import DDIMScheduler, InputError, LMSDiscreteScheduler, PNDMScheduler, Region, set_attend
from imvar.models.attention import CrossAttention
from tests.support.random_checkpoint import tiny_pipeline

BLOCKS = ["down_blocks.0", "mid_block", "up_blocks.1"]
LEFT = torch.zeros(64, 64)
LEFT[:, :32] = 1


def embeddings(n, b=1):
    return torch.randn(n, b, 1, 24, generator=torch.Generator().manual_seed(1)).unbind()


def run(pipe, image_embeds, **options):
    defaults = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt", "seed": 0}
    return pipe(image_embeds=image_embeds, **(defaults | options)).images


def dividing(embed):
    """Return regions that together are one embedding everywhere, by name."""
    generator = torch.Generator().manual_seed(2)
    ragged = (torch.rand(50, 70, generator=generator) < 0.5).float()
    soft = torch.rand(64, 64, generator=generator)
    return {
        "one": Region(embed),
        "full": [Region(embed, mask=torch.ones(5, 3))],
        "halves": [Region(embed, LEFT), Region(embed, 1 - LEFT)],
        "ragged": [Region(embed, ragged), Region(embed, 1 - ragged)],
        "soft": [Region(embed), Region(embed, soft)],
        "levels": [Region(embed, scale=dict.fromkeys(BLOCKS, 1))],
    }


@pytest.mark.parametrize("kind", dividing(torch.zeros(1, 1, 24)))
@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler, LMSDiscreteScheduler])
def test_one_embedding_in_all_regions_is_the_plain_call(pipe, kind, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    embeds = embeddings(1, 2)[0]
    options = {"num_images_per_prompt": 2, "height": 40}
    assert torch.equal(run(pipe, dividing(embeds)[kind], **options), run(pipe, embeds, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"height": 72, "width": 40},
        {"height": 96},
        {"cache_interval": 2},
        {"guidance_interval": (0.2, 0.8)},
        {"guidance_scale": 1.0},
        {"negative_image_embeds": embeddings(3)[2]},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["halves", "soft"])
def test_so_it_is_with_other_options(pipe, kind, options):
    (embed,) = embeddings(1)
    assert torch.equal(run(pipe, dividing(embed)[kind], **options), run(pipe, embed, **options))


@pytest.mark.parametrize("change", ["bfloat16", "float16", "sliced", "offloaded", "freeu"])
def test_so_it_is_with_other_settings(pipe, change):
    (embed,), options = embeddings(1), {"output_type": "latent"}
    if "float" in change:
        pipe.to(getattr(torch, change))
    elif change == "sliced":
        pipe.enable_attention_slicing("max")
    elif change == "offloaded":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    plain = run(pipe, embed, **options)
    for kind in "halves", "ragged":
        assert torch.equal(run(pipe, dividing(embed)[kind], **options), plain)


def test_a_region_over_everything_hides_those_below(pipe):
    a, b = embeddings(2)
    assert (run(pipe, [Region(a), Region(b, torch.ones(8, 8))]) - run(pipe, b)).abs().max() <= 1e-5
    assert (
        run(pipe, [Region(a, LEFT), Region(b, mask=Image.new("L", (9, 9), 255))]) - run(pipe, b)
    ).abs().max() <= 1e-5


def test_half_a_scale_is_half_the_embedding(pipe):
    (embed,) = embeddings(1)
    assert torch.equal(run(pipe, Region(embed, scale=0.5)), run(pipe, 0.5 * embed))
    assert torch.equal(run(pipe, Region(embed, scale=dict.fromkeys(BLOCKS, 0.5))), run(pipe, 0.5 * embed))
    assert torch.equal(run(pipe, Region(embed, scale=0)), run(pipe, 0 * embed))


def near(a, b):
    return (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_an_embedding_is_alone_in_the_blocks_that_its_scale_names(pipe):
    """As with weights by which the layer of such a block returns for one embedding what it did for the other."""
    a, b = embeddings(2)
    made, plain = (run(pipe, e, output_type="latent") for e in ([Region(a), Region(b, scale={"mid_block": 1})], a))
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v
    with torch.no_grad():
        layer.weight += torch.outer(layer((b - a)[0, 0]), a[0, 0]) / a.square().sum()
    assert near(run(pipe, a, output_type="latent"), made)
    assert not near(made, plain)


def test_each_half_follows_its_own_embedding(pipe):
    """The left one that of the right region's plain call, more than the right one, and the other way round."""
    a, b = embeddings(2)
    made, first, second = (run(pipe, e, output_type="latent") for e in ([Region(a), Region(b, LEFT)], a, b))
    to_first, to_second = ((made - plain).abs().mean(dim=(0, 1, 2)) for plain in (first, second))
    assert to_second[:6].mean() < to_first[:6].mean()
    assert to_first[-6:].mean() < to_second[-6:].mean()


def test_what_no_region_covers_is_negative(pipe):
    a, negative = embeddings(2)
    zeros, options = torch.zeros_like(a), {"negative_image_embeds": negative}
    assert near(run(pipe, Region(a, LEFT)), run(pipe, [Region(zeros), Region(a, LEFT)]))
    made = run(pipe, Region(a, LEFT), **options)
    assert near(made, run(pipe, [Region(negative), Region(a, LEFT)], **options))
    assert not near(made, run(pipe, [Region(zeros), Region(a, LEFT)], **options))


def test_each_image_has_its_own_embedding_in_a_region(pipe):
    """Or all have one: a region of one embedding goes with regions of several."""
    (a,), (b, c) = embeddings(1), embeddings(3)[1:]
    left = torch.rand(30, 30, generator=torch.Generator().manual_seed(0))
    both = run(pipe, [Region(a), Region(torch.cat([b, c])[:, 0], left)], seed=[3, 3])
    for made, embed in zip(both, (b, c), strict=True):
        assert (made - run(pipe, [Region(a), Region(embed, left)], seed=3)[0]).abs().max() <= 1e-5


def test_masks_are_images_arrays_and_tensors(pipe):
    (a, b), made = embeddings(2), []
    white = Image.fromarray(np.uint8(255 * LEFT.numpy()))
    masks = [
        LEFT,
        LEFT.bool(),
        LEFT.double().requires_grad_(),
        LEFT[::32, ::32],
        LEFT.numpy(),
        LEFT.numpy().astype(bool)[:, ::-1][:, ::-1],
        LEFT.numpy().astype(np.uint8),
        white,
        white.convert("1"),
        white.convert("RGB"),
    ]
    for mask in masks:
        made.append(run(pipe, [Region(a), Region(b, mask)], num_inference_steps=1))
    assert all(torch.equal(images, made[0]) for images in made)


def test_masks_of_several_sizes_go_together(pipe):
    a, b, c = embeddings(3)
    top = LEFT.T[::16, ::16]
    expected = run(pipe, [Region(a), Region(b, LEFT), Region(c, LEFT.T)])
    assert torch.equal(run(pipe, [Region(a), Region(b, LEFT), Region(c, top)]), expected)


def test_a_default_device_moves_no_mask(pipe):
    a, b = embeddings(2)
    expected = run(pipe, [Region(a), Region(b, LEFT, {"mid_block": 1})])
    with torch.device("meta"):
        regions = [Region(a), Region(b, LEFT.numpy(), {"mid_block": 1})]
        assert torch.equal(run(pipe, regions), expected)


def test_a_region_keeps_its_values_and_can_be_copied(pipe):
    mask, scale, (embed,) = LEFT.clone(), {"mid_block": 1}, embeddings(1)
    region = Region(embed, mask, scale)
    before = run(pipe, region)
    mask.zero_()
    scale.clear()
    for same in region, copy.deepcopy(region), pickle.loads(pickle.dumps(region)):
        assert torch.equal(run(pipe, same), before)
    with pytest.raises(AttributeError):
        region.scale = 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_embeds": "fox"}, "image_embeds: expected a tensor"),
        ({"image_embeds": torch.zeros(1, 2, 24)}, r"image_embeds: expected .*, got a tensor of shape \(1, 2, 24\)"),
        ({"mask": torch.zeros(2, 4, 4)}, r"mask: expected .* \(h, w\) .*, got a tensor of shape \(2, 4, 4\)"),
        ({"mask": torch.full((4, 4), 255)}, r"mask: expected values in \[0, 1\], got 255 to 255"),
        ({"mask": torch.full((4, 4), float("nan"))}, r"mask: expected values in \[0, 1\], got nan to nan"),
        ({"mask": torch.zeros(4, 4, device="meta")}, "mask: expected a tensor with values"),
        ({"mask": torch.zeros(4, 4, dtype=torch.complex64)}, "mask: expected"),
        ({"mask": torch.zeros(0, 4)}, "mask: expected"),
        ({"mask": "left"}, "mask: expected a PIL image, or an array or tensor .*, got str"),
        ({"mask": np.array([["a"]])}, "mask: expected"),
        ({"mask": Image.new("RGBA", (4, 4))}, r"mask: expected black and white, got transparent pixels"),
        ({"mask": Image.new("I;16", (4, 4))}, r"mask: expected one of the modes 1, L, LA, P, RGB, RGBA, got mode I;16"),
        ({"scale": 1.5}, "scale: expected a number from 0 to 1, got 1.5"),
        ({"scale": float("nan")}, "scale: expected a number from 0 to 1, got nan"),
        ({"scale": "all"}, "scale: expected a number from 0 to 1, got 'all'"),
        ({"scale": True}, "scale: expected a number from 0 to 1, got True"),
        ({"scale": {"mid_block": -1}}, r"scale\['mid_block'\]: expected a number from 0 to 1, got -1"),
    ],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(InputError, match=message):
        Region(**({"image_embeds": torch.zeros(1, 1, 24)} | options))


@pytest.mark.parametrize(
    ("image_embeds", "message"),
    [
        ([], "image_embeds: expected .* a Region or a list of them, got an empty list"),
        ([torch.zeros(1, 1, 24)], "image_embeds: expected .*, got a tensor of shape"),
        ([Region(torch.zeros(2, 1, 24)), Region(torch.zeros(3, 1, 24))], "image_embeds: expected .* as many images"),
        ([Region(torch.zeros(1, 1, 24)), Region(torch.zeros(1, 1, 32))], "image_embeds: expected .* one width"),
        (Region(torch.zeros(1, 1, 32)), "image_embeds: expected embeddings as wide"),
        (
            Region(torch.zeros(1, 1, 24), scale={"up_blocks.0": 1}),
            "scale: expected blocks with attention: down_blocks.0, mid_block, up_blocks.1, got 'up_blocks.0'",
        ),
    ],
)
def test_regions_that_do_not_go_together_are_refused(pipe, image_embeds, message):
    generator = torch.Generator()
    state = generator.get_state()
    with pytest.raises(InputError, match=message):
        run(pipe, image_embeds, seed=None, generator=generator)
    assert torch.equal(generator.get_state(), state)  # before any noise is drawn


def with_hook(pipe):
    pipe.unet.conv_in.register_forward_hook(lambda *_: None)
    return "got conv_in: a hook"


def with_kernel(pipe):
    set_attend(pipe.unet, lambda q, k, v: v.mean(dim=2, keepdim=True).expand_as(q), CrossAttention)
    return "got .*attn2: .* is a custom kernel"


def with_foreign_unet(pipe):
    own = pipe.unet

    class Foreign(torch.nn.Module):
        config = own.config

        def forward(self, *args, **options):
            return own(*args, **options)

    pipe.unet = Foreign()
    return "got Foreign"


def with_old_predictor(pipe):
    class Old(type(pipe)):
        def predictor(self, timesteps, context):
            return super().predictor(timesteps, context)

    pipe.__class__ = Old
    return "expected a pipeline whose predictor takes `regions`"


def with_kwargs(pipe):
    class Controlled(type(pipe)):
        def unet_kwargs(self, sample, timestep, context):
            return {}

    pipe.__class__ = Controlled
    return "without its own unet_kwargs, got regions for Controlled"


@pytest.mark.parametrize("change", [with_hook, with_kernel, with_foreign_unet, with_old_predictor, with_kwargs])
def test_where_regions_do_not_reach_they_are_refused(pipe, change):
    """And embeddings without regions are not."""
    (embed,), message = embeddings(1), change(pipe)
    assert run(pipe, embed).isfinite().all()
    with pytest.raises(InputError, match="image_embeds: expected .*" + message.removeprefix("expected ")):
        run(pipe, Region(embed))


def test_a_subclass_may_wrap_the_predictor(pipe):
    class Wrapped(type(pipe)):
        def predictor(self, timesteps, context, **options):
            predict = super().predictor(timesteps, context, **options)
            return lambda x, step: 0.5 * predict(x, step)

    a, b = embeddings(2)
    plain = run(pipe, [Region(a), Region(b, LEFT)])
    pipe.__class__ = Wrapped
    wrapped = run(pipe, [Region(a), Region(b, LEFT)])
    assert not torch.allclose(wrapped, plain, atol=1e-3)
    assert torch.equal(run(pipe, [Region(a), Region(a, LEFT)]), run(pipe, a))


def test_a_callback_that_adds_a_hook_is_an_error(pipe):
    (embed,) = embeddings(1)

    def callback(step, timestep, latents):
        pipe.unet.conv_in.register_forward_hook(lambda *_: None)

    with pytest.raises(InputError, match=r"regions: expected .*, got conv_in: a hook"):
        run(pipe, Region(embed), callback=callback)


def test_compiled_regions_are_those_of_the_eager_call(pipe):
    a, b = embeddings(2)
    eager = [run(pipe, [Region(a), Region(b, mask)], output_type="latent") for mask in (LEFT, LEFT.T)]
    pipe.compile(backend="eager")
    for mask, expected in zip((LEFT, LEFT.T), eager, strict=True):
        made = run(pipe, [Region(a), Region(b, mask)], output_type="latent")
        assert (made - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_seeds_give_their_variation_in_any_batch(pipe):
    a, b = embeddings(2)
    regions = [Region(a), Region(b, LEFT)]
    batch = run(pipe, regions, num_images_per_prompt=3)
    for k in range(3):
        assert (run(pipe, regions, seed=k)[0] - batch[k]).abs().max() <= 1e-5
    assert torch.equal(run(tiny_pipeline(), regions, num_images_per_prompt=3), batch)
