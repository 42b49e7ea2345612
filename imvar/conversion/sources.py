"""Find the checkpoint to convert: a path, a bundled checkpoint, or a repository or file on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError, invalid, short_repr
from ..weights.bundled import BUNDLED
from ..weights.hub import Hub, locate, locate_file, names_in
from ..weights.model_index import INDEX, PARTS, default_class
from ..weights.pretrained import PretrainedModel
from ..weights.read_errors import kind_of


def locate_source(source: str | Path, revision: str | None, only: str | None) -> Path:
    """Return the path of a checkpoint: `source` itself if it exists, else what it names on the hub, after its download.

    `only`: the part to fetch of a repository, None for all of them.
    """
    path, text, hub = Path(source), str(source), Hub(revision=revision)
    if kind_of(path) is not None:
        if revision is not None:
            raise invalid(InputError, "revision", f"None for the local checkpoint {path}", short_repr(revision))
        return path
    if text.startswith((".", "/", "~")):
        return path
    if text in BUNDLED or text.count("/") == 1:
        return locate(text, hub, lambda names: files_to_convert(names, only))
    if text.startswith("https://") or (text.count("/") > 1 and path.suffix in (".ckpt", ".safetensors", ".bin")):
        return locate_file(text, hub)
    return path


def files_to_convert(names: set[str], only: str | None) -> list[str]:
    """Return those of the `names` in a repository that an inspection reads: of weights, one format and variant."""
    files = [name for name in (INDEX,) if name in names]
    for part in PARTS:
        in_folder = names_in(names, f"{part}/")
        if not in_folder or only not in (None, part):
            continue
        model: Any = default_class(part)
        weights: list[str] = []
        if issubclass(model, PretrainedModel):
            variants = model.weights_name.variants(in_folder)
            weights = model.weights_name.select(in_folder, variants[0] if variants else None, None)
        config = [name for name in in_folder if name == model.config_name]
        files += [f"{part}/{name}" for name in (*config, *weights)]
    if files in ([], [INDEX]):
        expected = "folders of parts, such as unet" if only is None else f"a folder {only}"
        raise invalid(CheckpointError, None, expected, "none", "a single file is named owner/name/file.ckpt")
    return files
