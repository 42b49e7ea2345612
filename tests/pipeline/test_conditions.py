"""`conditions`: further inputs of one call, for the overridable stages `unet_input`, `unet_kwargs`, `_encode_image`."""

import threading

import pytest
import torch
from fork import wider_input

from imvar import InputError, InputTypeError, StableDiffusionImageVariationPipeline

ATOL = 1e-5


class Concat(StableDiffusionImageVariationPipeline):
    """Channels beside the latents, as in zero123 and InstructPix2Pix."""

    def unet_input(self, sample, timestep, *, pixels):
        return torch.cat([sample.repeat(len(pixels) // len(sample), 1, 1, 1), pixels.to(sample)], dim=1)


class Skips(StableDiffusionImageVariationPipeline):
    def unet_kwargs(self, sample, timestep, context, strength=1.0):
        assert len(context) in (len(sample), 2 * len(sample))
        return {"merge": lambda h, skip, block: torch.cat([h, strength * skip], dim=1)}


class Pose(StableDiffusionImageVariationPipeline):
    def _encode_image(self, image, device, number, guided, pose=None):
        context = super()._encode_image(image, device, number, guided)
        return context if pose is None else torch.cat([context, pose.expand(len(context), 1, -1)], dim=1)


def run(pipe, photo, **options):
    return pipe(photo, **({"num_inference_steps": 3, "output_type": "pt", "seed": 1} | options)).images


@pytest.fixture
def concat(pipe):
    wider_input(pipe, extra=4)
    torch.nn.init.normal_(pipe.unet.conv_in.weight[:, 4:].detach(), std=0.1)
    wide = Concat(**pipe.components)
    wide.set_progress_bar_config(disable=True)
    return wide


def test_channels_beside_the_latents(concat, photo):
    pixels = torch.randn(1, 4, 16, 16)
    made = run(concat, photo, conditions={"pixels": pixels})
    assert not torch.allclose(made, run(concat, photo, conditions={"pixels": -pixels}), atol=1e-3)
    handle = concat.unet.register_forward_pre_hook(lambda *_: None)  # the plain path
    assert torch.allclose(made, run(concat, photo, conditions={"pixels": pixels}), atol=ATOL)
    handle.remove()


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.5), (0.0, 0.0)])
def test_each_half_of_guidance_may_have_a_condition_of_its_own(concat, photo, interval):
    pixels = torch.randn(1, 4, 16, 16)
    made = run(concat, photo, conditions={"pixels": torch.cat([pixels, pixels])}, guidance_interval=interval)
    assert torch.allclose(
        made, run(concat, photo, conditions={"pixels": pixels}, guidance_interval=interval), atol=ATOL
    )
    other = run(concat, photo, conditions={"pixels": torch.cat([-pixels, pixels])}, guidance_interval=interval)
    assert torch.allclose(other, made, atol=ATOL) == (interval == (0.0, 0.0))


def test_deepcache_with_more_channels(concat, photo):
    pixels = torch.randn(1, 4, 16, 16)
    options = {"conditions": {"pixels": pixels}, "num_inference_steps": 6}
    exact, cached = run(concat, photo, **options), run(concat, photo, **options, cache_interval=2)
    other = run(concat, photo, conditions={"pixels": -pixels}, num_inference_steps=6)
    assert 0 < (cached - exact).abs().mean() < (other - exact).abs().mean()


def test_arguments_of_the_unet(pipe, photo):
    skips = Skips(**pipe.components)
    skips.set_progress_bar_config(disable=True)
    assert torch.allclose(run(skips, photo), run(pipe, photo), atol=ATOL)
    weaker = run(skips, photo, conditions={"strength": 0.5})
    assert not torch.allclose(weaker, run(pipe, photo), atol=1e-3)
    pipe.unet.merge = lambda h, skip, block: torch.cat([h, 0.5 * skip], dim=1)
    assert torch.allclose(weaker, run(pipe, photo), atol=ATOL)
    with pytest.raises(InputError, match=r"merge: expected None"):
        run(skips, photo, cache_interval=2)


def test_a_token_beside_the_embedding(pipe, photo):
    posed = Pose(**pipe.components)
    posed.set_progress_bar_config(disable=True)
    assert torch.equal(run(posed, photo), run(pipe, photo))
    assert not torch.allclose(run(posed, photo, conditions={"pose": torch.ones(1, 1, 24)}), run(pipe, photo), atol=1e-3)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"pixel": 1}, r"conditions: expected the names 'pixels', got \['pixel'\]"),
        ({}, r"conditions: expected the names 'pixels', got \[\]"),
        (None, "conditions: expected the names 'pixels'"),
        ({"pixels": 1, "pose": 2}, "conditions: expected the names 'pixels'"),
    ],
)
def test_wrong_names(concat, photo, conditions, message):
    with pytest.raises(InputError, match=message):
        run(concat, photo, conditions=conditions)


def test_conditions_that_nothing_takes(pipe, photo):
    with pytest.raises(InputError, match=r"conditions: expected none, got .*override unet_input"):
        run(pipe, photo, conditions={"pixels": torch.zeros(1)})
    with pytest.raises(InputTypeError, match="conditions: expected a dictionary"):
        run(pipe, photo, conditions=[1])
    assert torch.equal(run(pipe, photo, conditions={}), run(pipe, photo))


def test_threads_with_their_own_conditions(concat, photo):
    conditions = [{"pixels": torch.full((1, 4, 16, 16), float(i))} for i in range(3)]
    expected = [run(concat, photo, conditions=given) for given in conditions]
    made = [None] * 3

    def work(i):
        made[i] = run(concat, photo, conditions=conditions[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
