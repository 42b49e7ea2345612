"""Text for messages: shortened and escaped, as names and values from files are untrusted."""

from __future__ import annotations

import re
import reprlib
from typing import Any

MAX_MESSAGE_LENGTH = 2000  # characters
URL_USER = re.compile(r"(\bhttps?:/+)[^/@\s'\"]+@")  # pathlib leaves one slash
URL_QUERY = re.compile(r"(\bhttps?:/[^?\s'\"]*)\?[^\s'\";]+")


def printable(text: str) -> str:
    """Return `text` without credentials in URLs, with control characters escaped, cut to `MAX_MESSAGE_LENGTH`.

    Names from files are untrusted.
    """
    text = URL_QUERY.sub(r"\1?...", URL_USER.sub(r"\1...@", text))
    text = text if len(text) <= MAX_MESSAGE_LENGTH else f"{text[: MAX_MESSAGE_LENGTH - 200]} ... {text[-200:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def short_repr(value: Any) -> str:
    """Return `repr(value)`, cut to the length that a message can hold."""
    return _repr.repr(value)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or [""])[0][:200]


class ShortRepr(reprlib.Repr):
    """Also abbreviates integers too long for Python to print."""

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 4096 else f"<an integer of {x.bit_length()} bits>"


_repr = ShortRepr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 200
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 10


def format_bytes(count: float) -> str:
    """Return a size as text, in bytes, kB, MB or GB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
