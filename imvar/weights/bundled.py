"""Checkpoints bundled with imvar, in `imvar/checkpoints`, available without a network or a cache."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError, InputError, invalid, short_repr
from .read_errors import kind_of

BUNDLED = ("imvar-emoji",)
HOME = Path(__file__).resolve().parents[1] / "checkpoints"  # resolved, since some installers link each file


def bundled_checkpoint(name: str = BUNDLED[0], revision: str | None = None) -> Path:
    """Return the folder of a bundled checkpoint, in the published layout; diffusers accepts `str` of it.

    There is one revision, so `revision` is None or "main". Raises `InputError` for another one or for an unknown name,
    `CheckpointError` if the folder is missing.
    """
    if name not in BUNDLED:
        raise invalid(InputError, "name", f"a bundled checkpoint ({' or '.join(BUNDLED)})", short_repr(name))
    if revision not in (None, "main"):
        hint = f"{name} comes with imvar and has no other revisions"
        raise invalid(InputError, "revision", "None or 'main'", short_repr(revision), hint)
    folder = HOME / name
    if kind_of(folder) != "folder":
        hint = "install imvar again, unpacked"
        raise invalid(CheckpointError, folder, "a complete folder", "an incomplete installation", hint)
    return folder


def bundled_examples(name: str = BUNDLED[0]) -> dict[str, Path]:
    """Return the paths of the example images of a bundled checkpoint by name."""
    return {path.stem: path for path in sorted((bundled_checkpoint(name) / "examples").glob("*.png"))}
