"""Masks of every mode, as `Region` and `mask_image` read them."""

import io

import pytest
import torch
from PIL import Image

from imvar import InputError
from imvar.image.mask import MASK_MODES, read_mask

HALF = Image.new("L", (6, 8))
HALF.paste(255, (0, 0, 6, 4))  # the upper half


@pytest.mark.parametrize("mode", MASK_MODES)
@pytest.mark.parametrize("size", [None, (8, 6)])
def test_white_is_selected_in_each_mode(mode, size):
    expected = torch.zeros(1, 1, 8, 6)
    expected[..., :4, :] = 1
    assert torch.equal(read_mask("mask", HALF.convert(mode), size), expected)


def test_a_transparent_colour_of_a_palette():
    file = io.BytesIO()
    HALF.convert("P").save(file, "PNG", transparency=0)
    with pytest.raises(InputError, match="mask: expected black and white, got transparent pixels"):
        read_mask("mask", Image.open(file))


def test_arrays_and_tensors_of_several_masks():
    masks = torch.rand(3, 4, 5)
    for several in (masks, masks[:, None], masks[..., None].numpy()):
        assert torch.equal(read_mask("mask", several), masks[:, None])
    assert read_mask("mask", torch.ones(4, 5, dtype=torch.bool)).shape == (1, 1, 4, 5)
