"""Pictures to go with the model: inputs to try it on, and the held-out drawings that the tests measure it with."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from PIL import Image

from train_emoji.catalogue import REDUCED, STYLES, code
from train_emoji.drawings import Drawings, fetch, held_out, vectors
from train_emoji.pictures import save_grid

EXAMPLES = {
    "noto": {"dog": "🐶", "elephant": "🐘", "cake": "🎂", "helicopter": "🚁", "fox": "🦊", "zebra": "🦓"},
    "noto-v1": {"rabbit": "🐰", "camera": "📷", "strawberry": "🍓"},
    "fluent-flat": {"panda": "🐼", "fire-engine": "🚒", "octopus": "🐙"},
}
"""By style. Some were trained on, some are held out of concepts that were, and of zebras nothing was seen."""

FIXTURE_COLUMNS = 12


def write_examples(folder: Path, work: Path) -> None:
    """As PNG of 256 x 256 on white, named by what is shown, by whom, and whether it was held out."""
    folder.mkdir(parents=True, exist_ok=True)
    for style in STYLES:
        names = {code(character): name for name, character in EXAMPLES.get(style.name, {}).items()}
        if not names:
            continue
        with tarfile.open(fetch(style, work)) as files:
            for point, picture in vectors(files, only=names):
                character = chr(int(point, 16))
                new = character in REDUCED.unseen or REDUCED.held_out.get(character) == style.name
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                name = f"{names[point]}-{style.name}{'-held-out' if new else ''}.png"
                Image.alpha_composite(white, picture).convert("RGB").save(folder / name, optimize=True)


def write_fixture(folder: Path, drawings: Drawings) -> None:
    """The held-out drawings as one picture, 64 x 64 each in rows, and a list of what they show and who drew them."""
    kept = held_out(drawings, REDUCED)
    save_grid(folder / "held-out.png", kept.rgb(), FIXTURE_COLUMNS)
    shown = [
        {"code": str(one), "shows": chr(int(one, 16)), "style": str(style)}
        for one, style in zip(kept.codes, kept.styles, strict=True)
    ]
    (folder / "held-out.json").write_text(json.dumps(shown, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
