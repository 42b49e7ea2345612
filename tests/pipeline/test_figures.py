"""Outputs as HTML, as Jupyter shows them: parsed, and the images read back."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import torch
from PIL import Image, ImageChops

from imvar.pipeline.figures import MAX_IMAGES, MAX_SIDE, figures
from imvar.pipeline.output import StableDiffusionPipelineOutput


class Shown(HTMLParser):
    """The images and texts of HTML; raises if it is not well formed."""

    def __init__(self, text: str):
        super().__init__()
        self.images, self.texts, self.sizes, self.open = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag != "img":
            return self.open.append(tag)
        attributes = dict(attributes)
        kind, data = attributes["src"].split(",")
        assert kind == "data:image/png;base64"
        self.images.append(Image.open(io.BytesIO(base64.b64decode(data))))
        self.sizes.append((int(attributes["width"]), int(attributes["height"])))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def image(size=(64, 48), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def test_an_output_shows_its_images_with_seeds_and_flags():
    images = [image(seed=0), image(seed=1)]
    shown = Shown(StableDiffusionPipelineOutput(images, [False, True], seeds=[7, 8])._repr_html_())
    assert all(ImageChops.difference(*pair).getbbox() is None for pair in zip(images, shown.images, strict=True))
    assert shown.texts == ["seed 7", "seed 8 (flagged)"]
    assert shown.sizes == [(128, 96)] * 2


def test_an_output_without_seeds_and_flags_has_no_captions():
    shown = Shown(StableDiffusionPipelineOutput([image()])._repr_html_())
    assert (len(shown.images), shown.texts) == (1, [])


def test_arrays_and_tensors_are_shown_as_images_and_latents_as_text():
    array = np.asarray(image())[None] / 255
    for images in (array, torch.from_numpy(array).movedim(3, 1)):
        (shown,) = Shown(StableDiffusionPipelineOutput(images)._repr_html_()).images
        assert ImageChops.difference(shown, image()).getbbox() is None
    assert StableDiffusionPipelineOutput(torch.zeros(1, 4, 8, 8))._repr_html_() is None


def test_large_and_many_images_are_limited():
    assert Shown(figures([image((1024, 256))], [""])).images[0].size == (MAX_SIDE, MAX_SIDE // 4)
    shown = Shown(figures([image((2, 2))] * (MAX_IMAGES + 3), ["x"] * (MAX_IMAGES + 3)))
    assert (len(shown.images), shown.texts[-1]) == (MAX_IMAGES, "and 3 more")


def test_captions_are_escaped():
    shown = Shown(figures([image()], ['<script>alert("&")</script>']))
    assert shown.texts == ['<script>alert("&")</script>']
