"""The record of an image: what its pixels depend on, as a dictionary that JSON can represent.

`imvar/pipeline/records.py` makes them. The entries: `versions`, `checkpoint`, `seed`, `settings` (arguments of the
call), `scheduler`, `pipeline` (switches that are on), `machine`, `inputs` (by role, with digests), `call` (how many
images were made together, and which of them this one is), `exact`, and `reasons` why not. A record contains neither
paths nor times.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Record = dict[str, Any]

FORMAT = 1
DERIVED = {"format", "exact", "reasons", "flagged"}  # entries that follow from the others, or from the image
N_DIGEST = 12  # characters of a digest in a message


def differences(a: Record, b: Record) -> list[str]:
    """Return how two records differ, a line for each entry, such as "guidance_scale: 3.0 and 7.0".

    Names of files do not count where their pixels are equal, nor do entries that follow from the others.
    """
    of_a, of_b = entries_of(a), entries_of(b)
    names = [*of_a, *(name for name in of_b if name not in of_a)]
    pairs = {name: (of_a.get(name), of_b.get(name)) for name in names}
    differing = {name: pair for name, pair in pairs.items() if key_of_entry(pair[0]) != key_of_entry(pair[1])}
    return [f"{name}: {text_of(first)} and {text_of(second)}" for name, (first, second) in differing.items()]


def entries_of(record: Record) -> dict[str, Any]:
    """Return the entries of a record by the names that differences have; those of `settings` by their own."""
    entries: dict[str, Any] = {}
    for section, value in record.items():
        if section == "inputs":
            roles: dict[str, int] = {}
            for entry in value:
                count = roles[entry["role"]] = roles.get(entry["role"], 0) + 1
                entries[entry["role"] if count == 1 else f"{entry['role']} {count}"] = entry
        elif section not in DERIVED:
            entries |= flatten("" if section == "settings" else section, value)
    return entries


def flatten(name: str, value: Any) -> dict[str, Any]:
    """Return the values of nested dictionaries by dotted name."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {key: inner for k, v in value.items() for key, inner in flatten(f"{name}.{k}".strip("."), v).items()}


def key_of_entry(value: Any) -> Any:
    """Return what two equal entries have in common: for inputs with a digest of their pixels, all but the file."""
    if isinstance(value, Mapping) and value.get("pixels"):
        return {name: entry for name, entry in value.items() if name not in ("name", "sha256")}
    return value


def text_of(value: Any) -> str:
    """Return an entry as differences show it."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):  # an input
        parts = [value.get("name"), f"pixels {value['pixels'][:N_DIGEST]}" if value.get("pixels") else None]
        rest = {name: entry for name, entry in value.items() if name not in ("role", "name", "sha256", "pixels")}
        return " ".join(filter(None, [*parts, *(f"{name} {entry}" for name, entry in rest.items())])) or "unknown"
    text = str(value)
    return text[: N_DIGEST + len("sha256:")] if text.startswith("sha256:") else text
