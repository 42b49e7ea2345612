"""Whether an image can be made again from its record, and the command that does it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ..text import short_repr

OPTIONS = {"image": "--photo", "image_embeds": "--photo", "negative": "--negative", "init": "--init", "mask": "--mask"}
"""The option of `imvar again` for the file of each role among the inputs of a record."""
ROUNDED = ("compile", "cudnn.benchmark", "init_image")
"""What the reasons in a record begin with that keep an image from being made again exactly, but not up to rounding."""
SWITCHES = {
    "attention_backend",
    "attention_slicing",
    "channels_last",
    "compiled",
    "components",
    "fp8",
    "freeu",
    "int8",
    "offload",
    "vae_slicing",
    "vae_tiling",
}
"""The entries under `pipeline` that `imvar again` can set, or that change no more than rounding."""


def obstacles(record: dict[str, Any]) -> list[str]:
    """Return why an image cannot be made again; an empty list if it can."""
    found = [reason for reason in record["reasons"] if not reason.startswith(tuple(f"{name}:" for name in ROUNDED))]
    if not record["exact"] and not record["reasons"]:
        found.append("it is recorded as not exact, without a reason")
    if record["seed"] is None and not any(reason.startswith(("seed", "generator")) for reason in found):
        found.append("seed: none is recorded")
    found += [f"{entry['role']}: no option takes it" for entry in record["inputs"] if entry["role"] not in OPTIONS]
    found += [f"{name}: it cannot be set again" for name in record["pipeline"] if name not in SWITCHES]
    if others := record["checkpoint"].get("others"):
        found.append(f"{', '.join(map(str, others))}: not of this checkpoint")
    return list(dict.fromkeys(found))


def inexactness(record: dict[str, Any]) -> list[str]:
    """Return why an image can be made again only up to rounding; an empty list if it can be made exactly."""
    return [reason for reason in record["reasons"] if reason.startswith(tuple(f"{name}:" for name in ROUNDED))]


def command_of(record: dict[str, Any], path: str | Path) -> str:
    """Return the command line that makes an image again, with the names of its inputs as they were."""
    words = ["imvar", "again", str(path)]
    for entry in record["inputs"]:
        if option := OPTIONS.get(entry["role"]):
            words += [option, safe_name(entry)]
    return shlex.join(words)


def safe_name(entry: dict[str, Any]) -> str:
    """Return the name of an input, or what stands for it.

    It is from a file that anybody may have written, so without a folder.
    """
    name = (entry["name"] or "").replace("\\", "/").rpartition("/")[2]
    if not name or not name.isprintable() or len(name) > 200:
        return "EMBEDDING.safetensors" if entry["role"] == "image_embeds" else "PHOTO"
    return f"./{name}" if name.startswith("-") else name


def text_of_input(entry: dict[str, Any]) -> str:
    """Return an input as messages name it: the name of its file, and the beginning of its digest."""
    name = short_repr(entry["name"]) if entry["name"] else "without a name"
    return f"{name}, pixels {entry['pixels'][:12]}" if entry["pixels"] else name
