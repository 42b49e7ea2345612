"""The drawings: fetched by package name, rendered once to 64 x 64 RGBA, and cached in a file per style.

Every drawing of a single character by every vendor is rendered (8,000 in about two minutes). The functions below also
select the drawings to train on and to hold out.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Collection, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from train_emoji.catalogue import NOTO_CATEGORIES, STYLES, Split, Style, code, codes, full

SIDE = 64
RENDERED = 256  # pixels that a drawing is rendered at before it is downsampled


@dataclass(frozen=True)
class Drawings:
    """`images` (n, 4, 64, 64) uint8 RGBA, with the code point in hexadecimal and the style name of each."""

    images: torch.Tensor
    codes: np.ndarray
    styles: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def where(self, mask: np.ndarray) -> Drawings:
        return self.take(torch.from_numpy(mask).nonzero()[:, 0])

    def take(self, indices: torch.Tensor) -> Drawings:
        return Drawings(self.images[indices], self.codes[indices.numpy()], self.styles[indices.numpy()])

    def of(self, characters: Iterable[str], *, styles: Collection[str] | None = None) -> Drawings:
        mask = np.isin(self.codes, codes(characters))
        return self.where(mask if styles is None else mask & np.isin(self.styles, list(styles)))

    def labels(self, characters: Iterable[str]) -> torch.Tensor:
        """Return the index of each drawing's character in the list."""
        index = {code(character): i for i, character in enumerate(characters)}
        return torch.tensor([index[point] for point in self.codes])

    def rgb(self) -> torch.Tensor:
        """Return the drawings on white: (n, 3, 64, 64), values in [0, 1]."""
        colour, alpha = self.images[:, :3].float() / 255, self.images[:, 3:].float() / 255
        return colour * alpha + 1 - alpha


def concat(*parts: Drawings) -> Drawings:
    return Drawings(
        torch.cat([part.images for part in parts]),
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.styles for part in parts]),
    )


def is_held_out(drawings: Drawings, split: Split) -> np.ndarray:
    """Return which drawings are held out. The two Fluent styles share their shapes and are held out together."""
    style = {code(character): name for character, name in split.held_out.items()}
    drawn = np.where(drawings.styles == "fluent-3d", "fluent-flat", drawings.styles)
    return np.array([style.get(point) == name for point, name in zip(drawings.codes, drawn, strict=True)], bool)


def learnable(drawings: Drawings, split: Split) -> Drawings:
    """Return the drawings to train on: without held-out drawings, concepts and styles."""
    trained = np.isin(drawings.styles, [style.name for style in STYLES if style.trained])
    unseen = np.isin(drawings.codes, codes(split.unseen))
    return drawings.where(trained & ~unseen & ~is_held_out(drawings, split))


def held_out(drawings: Drawings, split: Split) -> Drawings:
    """Return the held-out drawings, each design once, in the order of the concepts."""
    kept = drawings.where(is_held_out(drawings, split) & (drawings.styles != "fluent-3d"))
    order = kept.labels(split.concepts).argsort(stable=True)
    return kept.take(order)


def load(folder: Path, until: float = math.inf) -> Drawings:
    """Return all drawings, of each style as `folder` has them, or fetched and rendered.

    Raises SystemExit before a style that would be rendered after `until`, a value of `time.monotonic()`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, style in enumerate(STYLES, start=1):
        path = folder / f"drawings-{style.name}.npz"
        if not path.exists():
            if time.monotonic() >= until:
                raise SystemExit("the budget ended while drawings were rendered; run the same command to resume")
            print(f"rendering {style.package}@{style.version}, {number} of {len(STYLES)}", flush=True)
            save(path, render(style, fetch(style, folder)))
        parts.append(load_style(path))
    return concat(*parts)


def load_style(path: Path) -> Drawings:
    """Return the drawings that `save` has written."""
    with np.load(path) as file:
        return Drawings(torch.from_numpy(file["images"]), file["codes"], file["styles"])


def save(path: Path, drawings: list[tuple[str, str, np.ndarray]]) -> None:
    codes, styles, images = zip(*drawings, strict=True)
    part, arrays = path.with_suffix(".part.npz"), {"images": np.stack(images), "codes": codes, "styles": styles}
    with zipfile.ZipFile(part, "w", zipfile.ZIP_LZMA) as file:  # a quarter smaller than by np.savez_compressed
        for name, values in arrays.items():
            with file.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, np.array(values))
    part.replace(path)


def fetch(style: Style, folder: Path) -> Path:
    """Return the path of the package archive, downloaded from the npm registry and checked against its digest."""
    path = folder / (style.package[1:].replace("/", "-") + f"-{style.version}.tgz")
    if not path.exists():
        try:
            subprocess.run(["npm", "pack", "--silent", f"{style.package}@{style.version}"], cwd=folder, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"npm could not fetch {style.package}@{style.version} into {folder}: {error}") from error
    digest = "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != style.integrity:
        raise SystemExit(
            f"{path}: expected the digest {style.integrity} of {style.package}@{style.version}, got {digest}"
        )
    return path


def render(style: Style, archive: Path) -> list[tuple[str, str, np.ndarray]]:
    """Return code point, style and RGBA (4, 64, 64) of every drawing of a single character, except empty ones."""
    with tarfile.open(archive) as files:
        images = vectors(files) if "package/icons.json" in files.getnames() else rasters(files)
        return downsample(style, images)


def downsample(style: Style, images: Iterable[tuple[str, Image.Image]]) -> list[tuple[str, str, np.ndarray]]:
    """Return code point, style and RGBA (4, 64, 64) of each image, except empty ones."""
    drawn = []
    for character, image in images:
        small = np.asarray(image.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS))
        if small[..., 3].mean() > 8:
            drawn.append((character, style.name, small.transpose(2, 0, 1)))
    return drawn


def everything(drawings: Drawings, folder: Path) -> Split:
    """Split the pictorial characters that at least four trained styles draw, by the categories of Noto's package."""
    names: dict[str, list[str]] = {}
    with tarfile.open(fetch(STYLES[0], folder)) as files:
        category = {
            name: category
            for noto_category, category in NOTO_CATEGORIES.items()
            for name in read(files, "metadata.json")["categories"][noto_category]
        }
        for point, name in read(files, "chars.json").items():
            point = point.removesuffix("-fe0f")
            drawn = drawings.styles[drawings.codes == point]
            if name in category and single(point) and len(drawn) - ("openmoji" in drawn) >= 4:
                names.setdefault(category[name], []).append(chr(int(point, 16)))
    return full({name: sorted(set(characters)) for name, characters in names.items()})


def rasters(files: tarfile.TarFile) -> Any:
    """Yield code point and image of each WebP file, named by code point, in an archive."""
    for name in files.getnames():
        character = name.removeprefix("package/assets/").removesuffix(".webp").removesuffix("-fe0f")
        if single(character):
            yield character, Image.open(io.BytesIO(files.extractfile(name).read()))  # type: ignore[union-attr]


def vectors(files: tarfile.TarFile, only: Container[str] | None = None) -> Any:
    """Yield code point and image of each icon of an Iconify set, or of the code points in `only`.

    A set without code points uses those of Noto's names.
    """
    icons = read(files, "icons.json")
    points = read(files, "chars.json") or names_of_noto(files)
    for point, name in sorted(points.items()):
        name = icons.get("aliases", {}).get(name, {}).get("parent", name)
        character = point.removesuffix("-fe0f")
        if name not in icons["icons"] or not single(character) or (only is not None and character not in only):
            continue
        yield character, draw(icons, name)


def draw(icons: dict[str, Any], name: str) -> Image.Image:
    """Return the image of an icon of an Iconify set, by its name."""
    try:
        import resvg_py  # only needed to render
    except ImportError as error:
        raise SystemExit("resvg_py, which renders the drawings, is not installed; run pip install .[train]") from error

    icon, width, height = icons["icons"][name], icons.get("width", 16), icons.get("height", 16)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {icon.get("width", width)} {icon.get("height", height)}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDERED, height=RENDERED)
    return Image.open(io.BytesIO(bytes(png)))


def names_of_noto(files: tarfile.TarFile) -> dict[str, str]:
    """Return code point to name of Noto's newer set, from its archive in the same folder."""
    with tarfile.open(fetch(STYLES[0], Path(str(files.name)).parent)) as newer:
        return read(newer, "chars.json")


def read(files: tarfile.TarFile, name: str) -> Any:
    """Return the content of a JSON file in a package."""
    return json.load(files.extractfile(f"package/{name}"))  # type: ignore[arg-type]


def single(point: str) -> bool:
    """Return whether a code point is a single character, and neither a skin tone nor a letter of a flag."""
    return (
        "-" not in point
        and point.isalnum()
        and not 0x1F1E6 <= int(point, 16) <= 0x1F1FF
        and not 0x1F3FB <= int(point, 16) <= 0x1F3FF
    )
