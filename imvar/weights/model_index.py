"""`model_index.json`, and the registry of the class for each part: weights/ reaches model classes through `PARTS`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..config import json_text
from ..errors import CheckpointError, invalid, short_repr

INDEX = "model_index.json"
DIFFUSERS_VERSION = "0.42.1"  # whose file format is written; readers branch on it

PARTS: dict[str, dict[str, Any]] = {
    part: {} for part in ("vae", "image_encoder", "unet", "scheduler", "safety_checker", "feature_extractor")
}
"""By part and class name in a checkpoint, the class that reads it. A class registers itself: `class X(..., part=)`."""

UNLISTED_PARTS = ("safety_checker",)  # which an index need not list
OPTIONAL_COMPONENTS = "safety_checker", "feature_extractor"  # which a pipeline can do without

LIBRARIES = {
    "image_encoder": "transformers",
    "feature_extractor": "transformers",
    "safety_checker": "stable_diffusion",
}  # as diffusers lists them; the other parts are of diffusers
PARALLEL = nn.DataParallel, nn.parallel.DistributedDataParallel
KNOWN_LIBRARIES = "diffusers", "transformers", "stable_diffusion", "imvar"  # which an index may list


def class_named(part: str, class_name: Any, path: Path) -> Any:
    """Return the class registered for a part under the name in `path`. It is looked up, never imported."""
    classes = PARTS.get(part, {})
    component_cls = classes.get(class_name) if isinstance(class_name, str) else None
    if component_cls is None:
        expected = " or ".join(classes) or "a part of this pipeline"
        hint = f"to use another class, pass {part}= to from_pretrained"
        raise invalid(CheckpointError, path, expected, short_repr(class_name), hint, key=part)
    return component_cls


def default_class(part: str) -> Any:
    """Return the class of a part for files that name none."""
    return next(iter(PARTS[part].values()))


def unwrap(component: Any) -> Any:
    """Return the component inside `torch.compile`, DataParallel and DistributedDataParallel, in any nesting."""
    while "_orig_mod" in (children := getattr(component, "_modules", {})) or isinstance(component, PARALLEL):
        component = children["_orig_mod" if "_orig_mod" in children else "module"]
    return component


def index_entry(part: str, component: Any) -> list[str | None]:
    """Return the library and class that the index lists for a component, without wrappers."""
    component = unwrap(component)
    return [None, None] if component is None else [LIBRARIES.get(part, "diffusers"), type(component).__name__]


def index_text(class_name: str, components: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the content of `model_index.json` for a pipeline of that class, with its components and own config."""
    entries = {part: index_entry(part, component) for part, component in components.items()}
    return json_text({"_class_name": class_name, "_diffusers_version": DIFFUSERS_VERSION} | dict(settings) | entries)
