"""`image_embeds`, `negative_image_embeds` and `encode_image`: embeddings in the place of images."""

import pytest
import torch

from imvar import InputError, InputTypeError


def run(pipe, *args, **options):
    return pipe(*args, **({"num_inference_steps": 2, "output_type": "latent", "seed": 1} | options)).images


@pytest.mark.parametrize("n", [1, 2])
def test_embeddings_of_images_give_the_images_variations(pipe, photo, n):
    photos = [photo, photo.rotate(90)]
    embeds = pipe.encode_image(photos)
    expected = run(pipe, photos, num_images_per_prompt=n)
    pipe.image_encoder = None
    for same in (embeds, embeds[:, 0]):
        assert torch.equal(run(pipe, image_embeds=same, num_images_per_prompt=n), expected)


def test_a_negative_embedding_replaces_the_zeros(pipe, photo):
    embeds = pipe.encode_image(photo)
    expected = run(pipe, photo)
    assert torch.equal(run(pipe, photo, negative_image_embeds=torch.zeros_like(embeds)), expected)
    negative = run(pipe, photo, negative_image_embeds=pipe.encode_image(photo.rotate(180)))
    assert not torch.allclose(negative, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, InputError, "image_embeds: expected image or image_embeds, got both"),
        ({"image": None, "image_embeds": torch.zeros(1, 2, 32)}, InputError, "one token for each image"),
        ({"image": None, "image_embeds": torch.zeros(1, 1, 5)}, InputError, "expected embeddings as wide"),
        ({"image": None, "image_embeds": torch.zeros(1, 1, 32).long()}, InputTypeError, "expected floats"),
        ({"image": None, "image_embeds": "fox"}, InputTypeError, "image_embeds: expected a tensor"),
        ({"negative_image_embeds": torch.zeros(3, 1, 32), "image_embeds": None}, InputError, "each of 1 images"),
        (
            {"negative_image_embeds": torch.zeros(1, 1, 32), "image_embeds": None, "guidance_scale": 1},
            InputError,
            "only under guidance",
        ),
    ],
)
def test_embeddings_that_cannot_be_used_are_refused(pipe, photo, options, kind, message):
    with pytest.raises(kind, match=message):
        run(pipe, **({"image": photo, "image_embeds": torch.zeros(1, 1, 32)} | options))
