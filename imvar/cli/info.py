"""`imvar info`: how an image was made, by the record in its file, and the command that makes it again."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..records.files import read_record
from ..records.remaking import command_of, inexactness, obstacles
from ..text import printable

ROLES = {"image": "photo", "image_embeds": "embedding", "negative": "away from", "init": "start", "mask": "mask"}
NOUNS = {"image_embeds": "an embedding", "region": "an embedding", "mask": "a mask", "latents": "a tensor"}
OPERATIONS = "weight", "slerp", "augment"  # on the embedding of an image
SETTINGS = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "strength": "strength",
    "eta": "eta",
    "guidance_interval": "guided steps",
    "guidance_rescale": "rescale",
    "cache_interval": "cache interval",
    "paste": "paste",
    "on_flagged": "if flagged",
    "conditions": "conditions",
}
DEFAULTS = {
    "eta": (0, None),
    "guidance_interval": ([0, 1], None),
    "guidance_rescale": (0, None),
    "cache_interval": (1, None),
    "paste": (False, None),
    "on_flagged": ("black", None),
    "conditions": ({}, None),
    "strength": (None,),
}
"""Values of settings that are not printed."""
LABEL = 16  # characters
N_DIGEST = len("sha256:") + 16  # characters


def run(args: argparse.Namespace) -> int:
    status = 0
    for i, path in enumerate(args.files):
        try:
            record = read_record(path)
        except InputError as error:
            print(f"imvar: {error}", file=sys.stderr)
            status = 1
            continue
        if args.json:
            command = None if obstacles(record) else command_of(record, path)
            print(json.dumps({"path": str(path), "record": record, "command": command}))
        else:
            print(("\n" if i else "") + "\n".join(lines_of(record, path)))
    return status


def lines_of(record: dict[str, Any], path: Path) -> Iterator[str]:
    """Yield the lines about one image."""
    yield f"{path}, an image by imvar {printable(record['versions'].get('imvar', '?'))}"
    width = max(60, min(100, shutil.get_terminal_size().columns))
    indent = " " * (LABEL + 2)
    for entries in (input_rows(record), setting_rows(record), checkpoint_rows(record), machine_rows(record)):
        yield ""
        for label, text in entries:
            lines = textwrap.wrap(printable(text), width - len(indent), break_on_hyphens=False) or [""]
            yield f"  {label:{LABEL}}{lines[0]}"
            yield from (indent + line for line in lines[1:])
    yield ""
    if reasons := obstacles(record):
        yield "It cannot be made again:"
        yield from (f"  {printable(reason)}" for reason in reasons)
        return
    reasons = inexactness(record)
    yield f"To make it again, {'equal up to rounding' if reasons else 'equal in every pixel on the same machine'}:"
    yield f"  {printable(command_of(record, path))}"
    if reasons:
        yield "Not exactly, because of:"
        yield from (f"  {printable(reason)}" for reason in reasons)


Rows = Iterator[tuple[str, str]]
"""Labels with texts."""


def input_rows(record: dict[str, Any]) -> Rows:
    for entry in record["inputs"]:
        text = str(entry["name"] or f"{NOUNS.get(entry['role'], 'an image')} without a name")
        more = "".join(f", {name} {readable(entry[name])}" for name in OPERATIONS if name in entry)
        yield str(ROLES.get(entry["role"], entry["role"])), text + more
    if record.get("flagged"):
        yield "flagged", "by the safety checker"


def setting_rows(record: dict[str, Any]) -> Rows:
    settings = record["settings"]
    yield "seed", readable(record["seed"])
    for name, label in SETTINGS.items():
        if name in settings and settings[name] not in DEFAULTS.get(name, ()):
            yield label, readable(settings[name])
    yield "size", f"{readable(settings.get('width'))} x {readable(settings.get('height'))}"
    config = {name: value for name, value in record["scheduler"]["config"].items() if value is not None}
    yield "scheduler", record["scheduler"]["class"].removesuffix("Scheduler")
    yield "", readable(config)


def checkpoint_rows(record: dict[str, Any]) -> Rows:
    checkpoint = record["checkpoint"]
    revision = f", revision {checkpoint['revision']}" if checkpoint["revision"] else ""
    yield "checkpoint", f"{checkpoint['name'] or 'without a name'}{revision}"
    yield "weights", (checkpoint["weights"] or "unknown")[:N_DIGEST]
    switches = {name: value for name, value in record["pipeline"].items() if name != "components"}
    if switches:
        yield "switches", readable(switches)


def machine_rows(record: dict[str, Any]) -> Rows:
    machine, call = record["machine"], record["call"]
    threads = f", {machine['threads']} thread{'s' * (machine['threads'] != 1)}" if machine["device"] == "cpu" else ""
    yield "made on", f"{machine['device']}, {' and '.join(dict.fromkeys(machine['dtype'].values()))}{threads}"
    if machine.get("device_name"):
        yield "", str(machine["device_name"])
    if call["rows"] > 1:
        of = f" of {call['images']} photos" if call["images"] > 1 else ""
        yield "made with", f"{call['rows'] - 1} other{'s' * (call['rows'] > 2)}{of} in one batch"
    yield "versions", readable({name: version for name, version in record["versions"].items() if name != "imvar"})


def readable(value: Any) -> str:
    """Return a value as people write it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list):
        return (" to " if len(value) == 2 else ", ").join(map(readable, value)) or "none"
    if isinstance(value, dict):
        words = (str(name) if entry is True else f"{name} {readable(entry)}" for name, entry in value.items())
        return ", ".join(words) or "none"
    return str(value)
