"""The settings that the page takes from the record of a dropped image, and a comparison of new images with it."""

from __future__ import annotations

from typing import Any

from ..choices import SCHEDULERS
from ..records.record import differences

CONTROLS = {"guidance_scale": "guidance", "num_inference_steps": "steps", "strength": "strength"}
"""Arguments of the pipeline, and the page's controls for them."""
CARRIED = ("height", "width", "eta", "guidance_interval", "cache_interval", "guidance_rescale")
"""Arguments without a control, which are used while the dropped image is there."""
PLACES = {
    "image": ("Image", "Second image"),
    "region": ("Image", "Second image"),
    "negative": ("Negative image",),
    "init": ("Start image",),
    "mask": ("what is painted over it",),
}
"""Where the page takes the images of each role."""
ELSEWHERE = ("call.row", "call.image")
"""Differences between records that change nothing: the place among the images of a call."""


def control_values(record: dict[str, Any], max_count: int) -> dict[str, Any]:
    """Return the values of the page's controls that a record has, by name."""
    settings, values = record["settings"], {}
    for name, control in CONTROLS.items():
        if isinstance(settings.get(name), (int, float)):
            values[control] = settings[name]
    for name, (class_name, _) in SCHEDULERS.items():
        if class_name == record["scheduler"]["class"]:
            values["scheduler"] = name
    weights = [entry.get("weight") for entry in record["inputs"] if entry["role"] == "image"]
    if len(weights) == 2 and isinstance(weights[1], (int, float)):
        values["share"] = weights[1]
    seeds = [] if record["seed"] is None else [str(record["seed"])]
    return values | {"locked": seeds, "count": min(record["call"]["rows"], max_count)}


def carried_arguments(record: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the pipeline that the page has no control for."""
    settings = record["settings"]
    return {name: settings[name] for name in CARRIED if settings.get(name) is not None}


def needed_images(record: dict[str, Any]) -> str:
    """Return which images have to be dropped where."""
    texts, roles = [], []
    for entry in record["inputs"]:
        places = PLACES.get(entry["role"], (entry["role"],))
        place = places[min(roles.count(entry["role"]), len(places) - 1)]
        texts.append(f"{entry['name'] or 'one without a name'} ({place})")
        roles.append(entry["role"])
    return ", ".join(texts) or "nothing"


def comparison(name: str, recorded: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """Return whether one of the new images is that of the record, or how it differs."""
    new = next((record for record in records if record["seed"] == recorded["seed"]), records[0])
    differing = [line for line in differences(recorded, new) if not line.startswith(ELSEWHERE)]
    if differing:
        return f"Not quite {name} (there and here): {'; '.join(differing)}"
    return f"The image of seed {recorded['seed']} is {name}, made again."
