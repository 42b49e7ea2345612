"""Tables in Markdown."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))


def reported(row: Sequence[str]) -> Sequence[str]:
    """Print a row once it is measured, and return it."""
    print("  ".join(f"{cell:>18}" for cell in row), file=sys.stderr, flush=True)
    return row


def settings_line(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def format_seconds(time: float) -> str:
    return f"{time:.2f} s" if time >= 1 else f"{1000 * time:.1f} ms"


def format_gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
