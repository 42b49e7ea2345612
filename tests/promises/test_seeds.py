"""A seed gives the same image alone, in a batch and in another order."""

import numpy as np
import pytest
import torch

from imvar import DDIMScheduler, InputError, InputTypeError

ATOL = 2e-5  # for values in [0, 1]: in batches of another size, kernels add in another order


def run(pipe, photo, **options):
    return pipe(photo, **({"num_inference_steps": 3, "output_type": "np"} | options))


def test_image_k_has_seed_plus_k(pipe, photo):
    batch = run(pipe, photo, num_images_per_prompt=3, seed=7)
    assert batch.seeds == [7, 8, 9]
    generators = [torch.Generator().manual_seed(7 + k) for k in range(3)]
    assert np.array_equal(batch.images, run(pipe, photo, num_images_per_prompt=3, generator=generators).images)
    for k in range(3):
        single = run(pipe, photo, seed=7 + k)
        assert single.seeds == [7 + k]
        assert np.abs(single.images[0] - batch.images[k]).max() < ATOL


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_in_another_order_and_batch(pipe, photo, eta):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    one = run(pipe, photo, num_images_per_prompt=3, seed=[5, 2, 9], eta=eta).images
    other = run(pipe, photo, num_images_per_prompt=3, seed=(9, 5, 1), eta=eta).images
    assert np.abs(one[0] - other[1]).max() < ATOL
    assert np.abs(one[2] - other[0]).max() < ATOL
    assert np.array_equal(one, run(pipe, photo, num_images_per_prompt=3, seed=[5, 2, 9], eta=eta).images)


def test_seeds_follow_the_order_of_images(pipe, photo):
    turned = photo.rotate(90)
    both = run(pipe, [photo, turned], num_images_per_prompt=2, seed=range(20, 24))
    assert both.seeds == [20, 21, 22, 23]
    assert np.abs(run(pipe, turned, seed=22).images[0] - both.images[2]).max() < ATOL


def test_without_a_seed(pipe, photo):
    output = run(pipe, photo)
    assert output.seeds is None
    assert output.to_tuple() == (output.images, output.nsfw_content_detected)
    assert len(run(pipe, photo, seed=1, return_dict=False)) == 2
    assert list(run(pipe, photo, seed=1)) == ["images", "nsfw_content_detected"]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run(pipe, photo, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [np.int64(3), torch.tensor(3), 2**63 - 1, 0])
def test_integers_of_any_type(pipe, photo, seed):
    assert run(pipe, photo, seed=seed, num_inference_steps=1).seeds == [int(seed)]


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
def test_invalid_seeds(pipe, photo, seed, kind):
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(kind, match="seed"):
        run(pipe, photo, seed=seed)


def test_seed_or_generator(pipe, photo):
    with pytest.raises(InputError, match="seed: expected seed or generator, got both"):
        run(pipe, photo, seed=3, generator=torch.Generator())
    with pytest.raises(
        InputError, match=r"seed: expected an integer from 0 to 9223372036854775806, got 9223372036854775807"
    ):
        run(pipe, photo, seed=2**63 - 1, num_images_per_prompt=2)


def test_seeds_of_latents(pipe, photo):
    assert run(pipe, photo, output_type="latent", seed=4).seeds == [4]
