"""The form of a record, and the check of one that was read from a file and may contain anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError, invalid, short_repr

FORMAT = 1  # of the records that this version writes and reads
MAX_DEPTH = 16  # levels of lists and dictionaries
MAX_INPUTS = 4096
MAX_IMAGES = 2**16  # of one call

ANY, TEXT, INTEGER, NUMBER, FLAG = "any value", "text", "an integer", "a number", "true or false"
OPTIONAL_TEXT, OPTIONAL_INTEGER = "text or null", "an integer or null"
KINDS: dict[str, tuple[type, ...]] = {
    TEXT: (str,),
    INTEGER: (int,),
    NUMBER: (int, float),
    FLAG: (bool,),
    OPTIONAL_TEXT: (str, type(None)),
    OPTIONAL_INTEGER: (int, type(None)),
}
SCHEMA: dict[str, Any] = {
    "format": INTEGER,
    "versions": {...: TEXT},  # each value of a dictionary with any keys
    "checkpoint": {"name": OPTIONAL_TEXT, "revision": OPTIONAL_TEXT, "weights": OPTIONAL_TEXT},
    "seed": OPTIONAL_INTEGER,
    "settings": {...: ANY},
    "scheduler": {"class": TEXT, "config": {...: ANY}},
    "pipeline": {...: ANY},
    "machine": {"device": TEXT, "dtype": {...: TEXT}, "threads": INTEGER},
    "inputs": [{"role": TEXT, "name": OPTIONAL_TEXT, "sha256": OPTIONAL_TEXT, "pixels": OPTIONAL_TEXT}],
    "call": {"rows": INTEGER, "row": INTEGER, "images": INTEGER, "image": INTEGER},
    "exact": FLAG,
    "reasons": [TEXT],
}
"""The entries that every record has. Others are allowed beside them."""


def check_record(record: Any, path: str | Path) -> None:
    """Raise `InputError` if a value is not a record of this format."""
    if not isinstance(record, dict) or "format" not in record:
        raise invalid(InputError, path, "a record with its format", short_repr(record)[:80])
    if record["format"] != FORMAT or isinstance(record["format"], bool):
        hint = "another version of imvar wrote it"
        raise invalid(InputError, path, f"a record of format {FORMAT}", short_repr(record["format"]), hint)
    check_depth(record, path)
    check_entry(record, SCHEMA, "", path)
    call = record["call"]
    if not (0 <= call["row"] < call["rows"] and 0 <= call["image"] < call["images"] <= call["rows"] <= MAX_IMAGES):
        raise invalid(InputError, path, "a row and an image within those of its call", short_repr(call))


def check_entry(value: Any, schema: Any, name: str, path: str | Path) -> None:
    """Check a value and all within it."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            raise invalid(InputError, path, f"a record whose {name} is a dictionary", type(value).__name__)
        for key in value if ... in schema else schema:
            if key not in value:
                raise invalid(InputError, path, f"a record with {name + '.' if name else ''}{key}", "one without it")
            check_entry(value[key], schema[...] if ... in schema else schema[key], f"{name}.{key}".strip("."), path)
    elif isinstance(schema, list):
        if not isinstance(value, list) or len(value) > MAX_INPUTS:
            expected = f"a record whose {name} is a list of at most {MAX_INPUTS}"
            raise invalid(InputError, path, expected, short_repr(value)[:80])
        for i, entry in enumerate(value):
            check_entry(entry, schema[0], f"{name}[{i}]", path)
    elif schema != ANY:
        kinds = KINDS[schema]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise invalid(InputError, path, f"a record whose {name} is {schema}", short_repr(value)[:80])


def check_depth(value: Any, path: str | Path) -> None:
    """Raise `InputError` for lists and dictionaries within each other to more than `MAX_DEPTH` levels."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise invalid(InputError, path, f"a record nested up to {MAX_DEPTH} levels", "one nested deeper")
