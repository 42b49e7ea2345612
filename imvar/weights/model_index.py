"""`model_index.json`: the parts of a checkpoint, and the class that serves each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import json_text
from ..errors import CheckpointError, short_repr

INDEX = "model_index.json"
FORMAT = "0.42.1"  # the diffusers version whose file format is written; readers branch on it

PARTS: dict[str, dict[str, Any]] = {
    # The class that serves each class name a checkpoint may give. The classes enter themselves: `class X(..., part=)`.
    "vae": {},
    "image_encoder": {},
    "unet": {},
    "scheduler": {},
    "safety_checker": {},
    "feature_extractor": {},
}

UNLISTED_PARTS = ("safety_checker",)  # what an index need not list
OPTIONAL_COMPONENTS = "safety_checker", "feature_extractor"  # parts without which some calls do

LIBRARIES = {
    "image_encoder": "transformers",
    "feature_extractor": "transformers",
    "safety_checker": "stable_diffusion",
}  # the column that diffusers reads; the rest are its own


KNOWN_LIBRARIES = "diffusers", "transformers", "stable_diffusion", "imvar"  # libraries that an index may name


def class_named(part: str, class_name: Any, path: Path) -> Any:
    """The class of that name for that part, looked up and never imported; `path` is where it is named."""
    classes = PARTS.get(part, {})
    found = classes.get(class_name) if isinstance(class_name, str) else None
    if found is None:
        raise CheckpointError(
            f"is {short_repr(class_name)}; imvar has {', '.join(classes) or 'no such part'}. Another can "
            f"be handed over: from_pretrained(..., {part}=...)",
            path=path,
            key=part,
        )
    return found


def default_class(part: str) -> Any:
    """The class that a part has where no file names one."""
    return next(iter(PARTS[part].values()))


def index_entry(part: str, value: Any) -> list[str | None]:
    """What the index says of a part: library and class."""
    return [None, None] if value is None else [LIBRARIES.get(part, "diffusers"), type(value).__name__]


def index_text(class_name: str, parts: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The file of a pipeline of that class, with these parts and settings of its own."""
    stamp = {"_class_name": class_name, "_diffusers_version": FORMAT}
    listed = {part: index_entry(part, value) for part, value in parts.items()}
    return json_text(stamp | dict(settings) | listed)
