"""Images side by side as HTML, which is how Jupyter shows outputs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL.Image import Image, Resampling

MAX_IMAGES = 64
MAX_SIDE = 512  # pixels; larger images are shown smaller, as all are stored in the notebook
MIN_SIDE = 128  # pixels on the screen; smaller images are shown larger
PAGE = '<div style="display: flex; flex-wrap: wrap; gap: 8px">{}</div>'
FIGURE = (
    '<figure style="margin: 0; text-align: center"><img src="{}" alt="{}" width="{}" height="{}" '
    'style="image-rendering: pixelated; margin: 0"><figcaption>{}</figcaption></figure>'
)


def figures(images: Sequence[Image], captions: Sequence[str]) -> str:
    """Return images as HTML, each with a caption; those beyond `MAX_IMAGES` are counted alone."""
    parts = [figure(image, caption) for image, caption in zip(images[:MAX_IMAGES], captions, strict=False)]
    left_out = len(images) - len(parts)
    return PAGE.format("".join([*parts, f"<p>and {left_out} more</p>" if left_out else ""]))


def figure(image: Image, caption: str) -> str:
    """Return one image with its caption as HTML; the image is a PNG in a data URI."""
    if max(image.size) > MAX_SIDE:
        image = image.copy()
        image.thumbnail((MAX_SIDE, MAX_SIDE), Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "png")
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    scale = -(-MIN_SIDE // max(image.size))  # a whole number, so that pixels stay squares
    width, height = (side * max(scale, 1) for side in image.size)
    return FIGURE.format(uri, escape(caption) or "image", width, height, escape(caption))
