"""A seed names a picture: alone, in a batch, in another order, from Python or the command line."""

import numpy as np
import pytest
import torch

from imvar import DDIMScheduler, InputError, InputTypeError

ALIKE = 2e-5  # of values in [0, 1], where pictures are made in batches of another shape: kernels add in another order


def made(pipe, photo, **options):
    return pipe(photo, **({"num_inference_steps": 3, "output_type": "np"} | options))


def test_picture_k_has_the_seed_and_k(pipe, photo):
    whole = made(pipe, photo, num_images_per_prompt=3, seed=7)
    assert whole.seeds == [7, 8, 9]
    generators = [torch.Generator().manual_seed(7 + k) for k in range(3)]
    assert np.array_equal(whole.images, made(pipe, photo, num_images_per_prompt=3, generator=generators).images)
    for k in range(3):
        alone = made(pipe, photo, seed=7 + k)
        assert alone.seeds == [7 + k]
        assert np.abs(alone.images[0] - whole.images[k]).max() < ALIKE


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_in_another_order_and_beside_others(pipe, photo, eta):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    one = made(pipe, photo, num_images_per_prompt=3, seed=[5, 2, 9], eta=eta).images
    other = made(pipe, photo, num_images_per_prompt=3, seed=(9, 5, 1), eta=eta).images
    assert np.abs(one[0] - other[1]).max() < ALIKE
    assert np.abs(one[2] - other[0]).max() < ALIKE
    assert np.array_equal(one, made(pipe, photo, num_images_per_prompt=3, seed=[5, 2, 9], eta=eta).images)


def test_seeds_go_with_pictures_in_their_order(pipe, photo):
    turned = photo.rotate(90)
    both = made(pipe, [photo, turned], num_images_per_prompt=2, seed=range(20, 24))
    assert both.seeds == [20, 21, 22, 23]
    assert np.abs(made(pipe, turned, seed=22).images[0] - both.images[2]).max() < ALIKE


def test_what_does_not_change_without_a_seed(pipe, photo):
    output = made(pipe, photo)
    assert output.seeds is None
    assert output.to_tuple() == (output.images, output.nsfw_content_detected)
    assert len(made(pipe, photo, seed=1, return_dict=False)) == 2
    assert list(made(pipe, photo, seed=1)) == ["images", "nsfw_content_detected"]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    made(pipe, photo, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [np.int64(3), torch.tensor(3), 2**63 - 1, 0])
def test_whole_numbers_of_any_kind(pipe, photo, seed):
    assert made(pipe, photo, seed=seed, num_inference_steps=1).seeds == [int(seed)]


@pytest.mark.parametrize(
    ("seed", "kind"),
    [
        (-1, InputError),
        (2**63, InputError),
        (1.5, InputTypeError),
        ("3", InputTypeError),
        (True, InputTypeError),
        ([1, 2], InputError),
        ([], InputError),
        ([1.5], InputTypeError),
        ([None], InputTypeError),
        ([-1], InputError),
        (torch.Generator(), InputTypeError),
        (float("nan"), InputTypeError),
        ({3}, InputTypeError),
    ],
)
def test_what_is_no_seed(pipe, photo, seed, kind):
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(kind, match="seed"):
        made(pipe, photo, seed=seed)


def test_seed_or_generator(pipe, photo):
    with pytest.raises(InputError, match="seed: expected seed or generator, got both"):
        made(pipe, photo, seed=3, generator=torch.Generator())
    with pytest.raises(
        InputError, match=r"seed: expected an integer from 0 to 9223372036854775806, got 9223372036854775807"
    ):
        made(pipe, photo, seed=2**63 - 1, num_images_per_prompt=2)


def test_latents_tell_their_seeds_as_well(pipe, photo):
    assert made(pipe, photo, output_type="latent", seed=4).seeds == [4]
