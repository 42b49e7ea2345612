"""Checkpoints that come with imvar, in `imvar/checkpoints`: found by name, with no network and no cache."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError, InputError, short_repr

BUNDLED = ("imvar-emoji",)
HOME = Path(__file__).resolve().parents[1] / "checkpoints"  # resolved, since some installers link file by file


def bundled_checkpoint(name: str = BUNDLED[0], revision: str | None = None) -> Path:
    """The folder of a checkpoint that comes with imvar, in the published layout: `str` of it is what diffusers takes.

    There is one state of it, so `revision` is None or "main". Raises `InputError` for another one or a name that is
    not bundled, `CheckpointError` if the folder is not there.
    """
    if name not in BUNDLED:
        raise InputError(
            f"{short_repr(name)}: no checkpoint of that name comes with imvar; {' or '.join(BUNDLED)} would do"
        )
    if revision not in (None, "main"):
        raise InputError(
            f"revision={short_repr(revision)}: {name} comes with imvar and has no revisions; leave it out",
            key="revision",
        )
    folder = HOME / name
    if not folder.is_dir():
        raise CheckpointError(
            f"no such folder: {name} comes with imvar, but this copy of imvar is not whole; "
            "installing it again, unpacked, would do",
            path=folder,
        )
    return folder


def bundled_examples(name: str = BUNDLED[0]) -> dict[str, Path]:
    """Picture files by name that come with such a checkpoint, of the kind that it makes variations of."""
    return {path.stem: path for path in sorted((bundled_checkpoint(name) / "examples").glob("*.png"))}
