"""The checkpoint of a pipeline in a record: where the weights of its components come from."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import CheckpointError, ImvarError, invalid
from ..weights.origin import Origin, WeightsFile
from .digests import file_digest

CHANGED = "changed"  # in place of a digest, for weights that are not those of the files
Entry = dict[str, Any]
Files = tuple[WeightsFile, ...]


@dataclass
class Checkpoint:
    """The entry of a record about the checkpoint, and the files of each entry within it that has yet no digest."""

    entry: Entry = field(default_factory=lambda: {"name": None, "revision": None, "weights": None})
    undigested: list[tuple[Entry, Files]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def add_digests(self) -> None:
        """Add the digests of the weights, or the reason why there is none. This reads files that are not known yet."""
        while self.undigested:
            entry, files = self.undigested.pop()
            try:
                entry["weights"] = f"sha256:{weights_digest(files)}"
            except ImvarError:
                self.reasons.append(f"weights: the files of {entry['name']} have changed since they were loaded")


def checkpoint_of(models: Mapping[str, Sequence[nn.Module]]) -> Checkpoint:
    """Return where the weights of models come from, each given by its layers, of which the first is itself.

    The entry is that of the UNet's checkpoint; models from elsewhere have entries of their own under `others`.
    """
    checkpoint = Checkpoint()
    origins: dict[str, Origin | None] = {name: getattr(layers[0], "_origin", None) for name, layers in models.items()}
    main = origins.get("unet") or next(filter(None, origins.values()), None)
    known = {name: origin for name, origin in origins.items() if origin is not None}
    others: dict[str, Entry] = {}
    for source in dict.fromkeys(map(source_of, known.values())):
        of_source = {name: origin for name, origin in known.items() if source_of(origin) == source}
        entry = entry_of(of_source.values())
        if changed := [name for name, origin in of_source.items() if not origin.is_of(models[name])]:
            entry["weights"] = CHANGED
            checkpoint.reasons += [
                f"{name}: its weights or layers were changed after they were loaded" for name in changed
            ]
        else:
            files = {file for origin in of_source.values() for file in origin.files}
            checkpoint.undigested.append((entry, tuple(sorted(files))))
        if main is not None and source == source_of(main):
            checkpoint.entry = entry
        else:
            others |= dict.fromkeys(of_source, entry)
    for name in (name for name in origins if name not in known):
        others[name] = {"name": None, "revision": None, "weights": None}
        checkpoint.reasons.append(f"{name}: its weights are not from a file")
    if others:
        checkpoint.entry["others"] = others
    return checkpoint


def source_of(origin: Origin) -> tuple[Any, ...]:
    """Return what the models of one checkpoint have in common."""
    return origin.name, origin.revision, origin.commit


def entry_of(origins: Iterable[Origin]) -> Entry:
    """Return the entry of the checkpoint of these models, without the digest of its weights."""
    entry: Entry = {"name": None, "revision": None, "weights": None}
    for origin in origins:
        entry |= {"name": origin.name, "revision": origin.revision}
        details = {"commit": origin.commit, "ema": origin.ema}
        entry |= {name: value for name, value in details.items() if value is not None}
    return entry


@functools.lru_cache(maxsize=64)
def weights_digest(files: Files) -> str:
    """Return one SHA-256 digest of the names and contents of files, in order of their names.

    Raises `ImvarError` if one of them has changed since it was loaded.
    """
    lines = []
    for file in files:
        digest = file.digest_in_name()
        if digest is None:
            digest = file_digest(file.path)
            if not file.is_same_file():
                raise invalid(CheckpointError, file.path, "the file that was loaded", "one that has changed since")
        lines.append(f"{file.name} {digest}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
