"""Arguments of a call: invalid ones are refused before any work, valid ones may be numbers of any type."""

from __future__ import annotations

import functools
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

import imvar
from imvar import DDIMScheduler, InputError

NAN, INF = float("nan"), float("inf")
PHOTO = Image.new("RGB", (64, 48), "red")
x = torch.zeros(1, 4, 16, 16)


def run(pipe, image, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return pipe(image, **({"num_inference_steps": 3, "output_type": "np", "generator": generator} | options)).images


async def never_awaited(*_):
    """A callback that returns before it runs."""


def never_iterated(*_):
    yield "another one"


async def never_either(*_):
    yield "and one more"


class Never:
    """A callback of methods that return before they run."""

    async def __call__(self, *_):
        """As `never_awaited`."""

    def iterated(self, *_):
        yield "as `never_iterated`"


CALLS = {  # name and value as the message gives them
    ("image", "an empty list"): {"image": []},
    ("image[1]", "NoneType"): {"image": [PHOTO, None]},
    ("height", "100; pass one divisible by 8"): {"height": 100},
    ("height", "4; pass one divisible by 8"): {"height": 4},
    ("width", "-64"): {"width": -64},
    ("num_inference_steps", "0"): {"num_inference_steps": 0},
    ("num_images_per_prompt", "0"): {"num_images_per_prompt": 0},
    ("guidance_scale", "nan"): {"guidance_scale": NAN},
    ("guidance_scale", "inf"): {"guidance_scale": INF},
    ("guidance_scale", "-0.5; pass 1 for no guidance"): {"guidance_scale": -0.5},
    ("eta", "nan"): {"eta": NAN},
    ("eta", "2"): {"eta": 2},
    ("generator", "42"): {"generator": 42},
    ("generator", "2"): {"generator": [torch.Generator(), torch.Generator()]},
    ("latents", "a tensor of shape (1, 4, 8, 8)"): {"latents": x[..., :8, :8]},
    ("latents", "list"): {"latents": [1]},
    ("latents", "NaN or infinite values"): {"latents": x * NAN},
    ("output_type", "'jpeg'"): {"output_type": "jpeg"},
    ("on_flagged", "'white'"): {"on_flagged": "white"},
    ("return_dict", "0"): {"return_dict": 0},
    ("callback", "3"): {"callback": 3},
    ("callback_steps", "0"): {"callback_steps": 0},
    ("guidance_interval", "(0.9, 0.1)"): {"guidance_interval": (0.9, 0.1)},
    ("guidance_interval", "0.5"): {"guidance_interval": 0.5},
    ("guidance_interval", "nan"): {"guidance_interval": (0.0, NAN)},
    ("cache_interval", "0"): {"cache_interval": 0},
    ("seed", "-1"): {"seed": -1},
    ("seed", "both; leave one of them out"): {"seed": 1, "generator": torch.Generator()},
    ("seed", "both; leave one of them out, as no step draws noise"): {"seed": 1, "latents": x},
    ("image[0]", "a batch of shape (2, 48, 64, 3)"): {"image": [np.zeros((2, 48, 64, 3), np.uint8)]},
    ("image", "a tensor of shape (1, 3, 0, 32)"): {"image": torch.zeros(1, 3, 0, 32)},
    ("image", "torch.float8_e4m3fn"): {"image": torch.zeros(1, 3, 32, 32).to(torch.float8_e4m3fn)},
    ("image", "a torch.sparse_coo tensor"): {"image": torch.zeros(1, 3, 32, 32).to_sparse()},
    ("latents", "torch.float8_e4m3fn"): {"latents": x.to(torch.float8_e4m3fn)},
    ("callback", "<function"): {"callback": lambda: None},
    ("callback", "<function never_awaited"): {"callback": never_awaited},
    ("callback", "<function never_iterated"): {"callback": never_iterated},
    ("callback", "<function never_either"): {"callback": never_either},
    ("callback", "<tests.pipeline.test_call_arguments.Never"): {"callback": Never()},
    ("callback", "<bound method Never.iterated"): {"callback": Never().iterated},
    ("callback", "functools.partial(<function never_iterated"): {"callback": functools.partial(never_iterated)},
    ("callback", "functools.partial(<tests.pipeline"): {"callback": functools.partial(Never())},
    ("guidance_scale", "b'3'"): {"guidance_scale": b"3"},
    ("guidance_scale", "tensor(True)"): {"guidance_scale": torch.tensor(True)},
    ("num_inference_steps", "tensor(True)"): {"num_inference_steps": torch.tensor(True)},
    ("num_inference_steps", "tensor(..., device='meta'"): {"num_inference_steps": torch.tensor(2, device="meta")},
    ("seed", "np.True_"): {"seed": np.True_},
}


@pytest.mark.parametrize(("name", "got"), CALLS)
def test_a_call_is_refused_before_any_work(pipe, name, got):
    def work(*args, **kwargs):
        raise AssertionError("began")

    idle = type(pipe)(**(pipe.components | {"feature_extractor": work, "scheduler": DDIMScheduler()}))
    with pytest.raises(InputError) as caught:
        idle(**({"image": PHOTO} | CALLS[name, got]))
    assert str(caught.value).startswith(f"{name}: expected ")
    assert f", got {got}" in str(caught.value)


def test_an_image_of_another_size_is_named_as_the_argument(pipe):
    with pytest.raises(InputError, match=r"^image: expected images of size \(32, 32\), got \(64, 64\)"):
        pipe(torch.randn(1, 3, 64, 64))


def test_latents_of_a_subclass_that_calls_the_stages(pipe):
    with pytest.raises(InputError, match=r"latents: .* got a tensor of shape \(1, 4, 8, 8\)"):
        pipe.prepare_latents(1, 4, 128, 128, torch.float32, torch.device("cpu"), None, x[..., :8, :8])
    with pytest.raises(InputError, match=r"latents: .* got list"):
        pipe.prepare_latents(1, 4, 128, 128, torch.float32, torch.device("cpu"), None, [1])


def test_callbacks_that_wrap_another(pipe):
    def inner(latents):
        shapes.append(latents.shape)

    @functools.wraps(inner)
    def outer(step, timestep, latents):
        inner(latents)

    shapes = []
    run(pipe, PHOTO, callback=outer)
    assert len(shapes) == 3


@pytest.mark.parametrize(
    ("effect", "words"),
    [
        (lambda pipe, x: never_iterated(), "a function that runs when it is called, got one that returned a generator"),
        (
            lambda pipe, x: x.resize_(1, 4, 8, 8),
            r"latents of shape \(1, 4, 16, 16\) .*, got a tensor of shape \(1, 4, 8",
        ),
        (lambda pipe, x: pipe.to("meta"), "components: expected weights in memory, got vae on meta"),
        (lambda pipe, x: pipe.unet.to("meta"), "components: expected weights in memory, got .*unet on meta"),
    ],
)
def test_effects_of_a_callback_that_a_step_cannot_go_on_from(pipe, effect, words):
    steps = []
    with pytest.raises(InputError, match=words):
        run(pipe, PHOTO, callback=lambda i, t, x: steps.append(i) or effect(pipe, x))
    assert len(steps) == 1


@pytest.mark.filterwarnings("ignore:coroutine")
def test_a_callback_that_returns_a_coroutine(pipe):
    with pytest.raises(InputError, match=r"callback: .*returned a coroutine"):
        run(pipe, PHOTO, callback=lambda *_: never_awaited())


@pytest.mark.parametrize("scale", [0, 0.5, 1])
def test_guidance_scales_up_to_1_are_no_guidance(pipe, scale):
    batches = []
    pipe.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    run(pipe, PHOTO, guidance_scale=scale)
    assert set(batches) == {1}


def test_images_need_a_feature_extractor(pipe):
    components = pipe.components | {"feature_extractor": None, "safety_checker": None}
    bare = type(pipe)(**components, requires_safety_checker=False)
    with pytest.raises(InputError, match="feature_extractor: expected a CLIPImageProcessor for images, got None"):
        bare(PHOTO)


class Index:
    """An integer by `__index__` alone."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.array, torch.tensor, Index])
def test_integers_of_any_kind(pipe, photo, kind):
    """Narrow ones as well, with which arithmetic would overflow."""
    assert np.array_equal(
        run(
            pipe,
            photo,
            num_inference_steps=kind(120),
            height=kind(64),
            width=kind(64),
            callback_steps=kind(7),
            num_images_per_prompt=kind(1),
            callback=lambda *_: None,
        ),
        run(pipe, photo, num_inference_steps=120, height=64, width=64),
    )


@pytest.mark.parametrize("kind", [np.float32, np.array, Fraction, Decimal, torch.tensor, lambda x: torch.tensor([[x]])])
def test_numbers_of_any_kind(pipe, photo, kind):
    pipe.scheduler = imvar.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    assert np.array_equal(
        run(pipe, photo, guidance_scale=kind(2.5), eta=kind(0.5), guidance_interval=(kind(0.0), 0.5)),
        run(pipe, photo, guidance_scale=2.5, eta=0.5, guidance_interval=(0.0, 0.5)),
    )


def test_an_encoder_with_nan_is_named_before_the_first_step(pipe, photo):
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("a step was taken"))
    pipe.image_encoder.visual_projection.weight.data[0, 0] = NAN
    with pytest.raises(imvar.ImvarError, match=r"embeddings: expected finite.*CLIPVisionModelWithProj.*proj.*\.weight"):
        run(pipe, photo)


def test_latents_that_their_dtype_cannot_hold(pipe, photo):
    with pytest.raises(InputError, match="latents: expected finite floats, got NaN or infinite values"):
        run(pipe, photo, latents=torch.full((1, 4, 16, 16), 1e300, dtype=torch.float64))
    with pytest.raises(imvar.ImvarError, match="latents too large"):
        run(pipe, photo, latents=torch.full((1, 4, 16, 16), 1e37))


@pytest.mark.parametrize("wrong", [{"eta": 2}, {"output_type": "jpeg"}, {"num_inference_steps": 1001}])
def test_a_refused_call_draws_no_noise(pipe, photo, wrong):
    pipe.scheduler = imvar.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(InputError):
        run(pipe, photo, generator=generator, **wrong)
    assert torch.equal(generator.get_state(), before)
