"""Images shipped with the model: example inputs, and the held-out drawings that the tests evaluate it on."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from PIL import Image

from train_emoji.catalogue import REDUCED, STYLES, code
from train_emoji.drawings import Drawings, fetch, held_out, vectors
from train_emoji.grids import save_grid

EXAMPLES = {
    "noto": {"dog": "🐶", "elephant": "🐘", "cake": "🎂", "helicopter": "🚁", "fox": "🦊", "zebra": "🦓"},
    "noto-v1": {"rabbit": "🐰", "camera": "📷", "strawberry": "🍓"},
    "fluent-flat": {"panda": "🐼", "fire-engine": "🚒", "octopus": "🐙"},
}
"""By style. Some are training drawings, some are held-out drawings, and the zebra is a held-out concept."""

FIXTURE_COLUMNS = 12


def write_examples(folder: Path, work: Path) -> None:
    """Write PNGs of 256 x 256 on white, named by concept, style and whether they are held out."""
    folder.mkdir(parents=True, exist_ok=True)
    for style in STYLES:
        names = {code(character): name for name, character in EXAMPLES.get(style.name, {}).items()}
        if not names:
            continue
        with tarfile.open(fetch(style, work)) as files:
            for point, image in vectors(files, only=names):
                character = chr(int(point, 16))
                is_held_out = character in REDUCED.unseen or REDUCED.held_out.get(character) == style.name
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                name = f"{names[point]}-{style.name}{'-held-out' if is_held_out else ''}.png"
                Image.alpha_composite(white, image).convert("RGB").save(folder / name, optimize=True)


def write_fixture(folder: Path, drawings: Drawings) -> None:
    """Write the held-out drawings as one image, a grid of 64 x 64, and a list of their concepts and styles."""
    drawings = held_out(drawings, REDUCED)
    save_grid(folder / "held-out.png", drawings.rgb(), FIXTURE_COLUMNS)
    entries = [
        {"code": str(point), "shows": chr(int(point, 16)), "style": str(style)}
        for point, style in zip(drawings.codes, drawings.styles, strict=True)
    ]
    (folder / "held-out.json").write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
