"""New drawings to fine-tune on: Mozilla's, which imvar-emoji was not trained on.

They are in the package @iconify-json/fxemoji. Credit: FxEmojis, copyright 2015 Mozilla Foundation, visual design under
CC BY 4.0 (https://mozilla.github.io/fxemoji/LICENSE.md); the package itself states Apache-2.0, the licence of their
code. They are rendered to 64 x 64 pixels, and neither they nor a model trained on them is part of imvar.
"""

from __future__ import annotations

import tarfile
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from train_emoji.catalogue import REDUCED, STYLES, Style, code, codes
from train_emoji.drawings import Drawings, downsample, draw, fetch, load_style, read, save, vectors
from train_emoji.measures import nearest

FXEMOJI = Style(
    "fxemoji",
    "@iconify-json/fxemoji",
    "1.2.2",
    "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
    "CC BY 4.0",
    trained=False,
)
OPENMOJI = next(style for style in STYLES if style.name == "openmoji")
CATEGORIES = ("Nature", "Objects", "People", "Places")  # of the package; the others are Flags and Symbols
N_PARTS = 8  # of the drawings in the order of their names, each eighth one is in the same part
VALIDATION, HELD_OUT = (1,), (3, 7)  # the others are trained on
NEAR_COPY = 0.03  # mean absolute difference of pixels, as in scripts/evaluate_emoji.py

NAMES = {
    "🐶": "dog",
    "🐱": "cat",
    "🐭": "mouse",
    "🐰": "bunny",
    "🐻": "bear",
    "🐯": "tiger",
    "🐷": "pig",
    "🐸": "frog",
    "🐳": "spurtingwhale",
    "🌲": "evergreen",
    "☀": "sunrays",
    "⚡": "bolt",
    "🌍": "europeafricaglobe",
    "📱": "cellphone",
    "💡": "lightbulb",
    "🎁": "present",
    "👓": "glasses",
    "👕": "mansshirt",
    "👟": "mensrunner",
    "👠": "heels",
    "💎": "gem",
    "🔍": "leftmagnifyingglass",
    "🎾": "tennisball",
    "😂": "grintears",
    "😍": "hearteyes",
    "😎": "sunglasses",
    "😢": "crying",
    "😡": "pouting",
    "😱": "screamfear",
    "😴": "sleeping",
    "💩": "poo",
    "👽": "alien",
    "😷": "medicalmask",
    "😈": "devilhorns",
}
"""Mozilla's names of the judge's concepts that are not names of Unicode."""


def concepts() -> dict[str, str]:
    """Return the code point of each concept that the judge was trained on, by Mozilla's name."""
    names = {}
    for character in REDUCED.concepts:
        official = unicodedata.name(character).lower().replace(" ", "").replace("-", "")
        names[NAMES.get(character, official)] = code(character)
    return names


def load_fxemoji(folder: Path) -> Drawings:
    """Return Mozilla's pictorial drawings with their names as `codes`, in order, from a cache in `folder`."""
    path = folder / "drawings-fxemoji.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fetch(FXEMOJI, folder)) as files:
            icons, categories = read(files, "icons.json"), read(files, "metadata.json")["categories"]
            names = sorted({name for category in CATEGORIES for name in categories[category]})
            images: Iterator[tuple[str, Image.Image]] = ((name, draw(icons, name)) for name in names)
            save(path, downsample(FXEMOJI, images))
    return load_style(path)


def load_openmoji(folder: Path) -> Drawings:
    """Return OpenMoji's drawings of the judge's concepts, from a cache in `folder`: the control."""
    path = folder / "drawings-openmoji-concepts.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fetch(OPENMOJI, folder)) as files:
            save(path, downsample(OPENMOJI, vectors(files, only=codes(REDUCED.concepts))))
    return load_style(path)


def split(drawings: Drawings) -> tuple[Drawings, Drawings, Drawings]:
    """Return the drawings to train on, to validate with and to hold out; of these two, no near-copies of the first."""
    part = np.arange(len(drawings)) % N_PARTS
    trained = drawings.where(~np.isin(part, VALIDATION + HELD_OUT))

    def without_copies(parts: Iterable[int]) -> Drawings:
        chosen = drawings.where(np.isin(part, list(parts)))
        return chosen.where((nearest(chosen.rgb(), trained.rgb()) >= NEAR_COPY).numpy())

    return trained, without_copies(VALIDATION), without_copies(HELD_OUT)
