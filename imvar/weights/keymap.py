"""The engine that translates tensor names: rows in, both directions out.

A row says what one module or tensor of ours is called over there. We always start from our own
names and ask for their spelling, so no name is ever parsed: the row whose name is the longest
beginning of ours decides, and what follows it is the same on both sides. A fork's own parameters
are therefore saved under the place they live in, and found there again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError


@dataclass(frozen=True)
class Row:
    """One place: our name, the published name, and older spellings of that."""

    ours: str
    theirs: str
    older: tuple[str, ...] = ()

    @property
    def spellings(self) -> tuple[str, ...]:
        return (self.theirs, *self.older)


def under(place: Row, rows: Iterable[Row]) -> Iterator[Row]:
    """The place, and the rows that lie in it."""
    yield place
    for row in rows:
        theirs = [f"{outer}.{inner}" for outer in place.spellings for inner in row.spellings]
        yield Row(f"{place.ours}.{row.ours}", theirs[0], tuple(theirs[1:]))


class Keymap:
    """The dictionary of one model. `droppable` lists, as patterns, what a file may hold beside its weights."""

    def __init__(self, rows: Iterable[Row], droppable: Iterable[str] = ()):
        self.rows = {row.ours: row for row in rows}
        self.droppable = tuple(droppable)

    def spellings(self, ours: str) -> list[str]:
        """What a tensor of ours may be called in a file, the current name first."""
        place, rest = ours, ""
        while place not in self.rows:
            if not place:
                return [ours]
            place, _, last = place.rpartition(".")
            rest = f".{last}{rest}"
        return [f"{theirs}{rest}" for theirs in self.rows[place].spellings]

    def drops(self, theirs: str) -> bool:
        """Whether a file may hold this tensor without the model having a use for it."""
        return any(fnmatchcase(theirs, pattern) for pattern in self.droppable)

    def renamed(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Whichever of `tensors` have a published name, under our `names`; the rest as they are."""
        ours = {theirs: name for name in names for theirs in self.spellings(name)}
        return {ours.get(name, name): tensor for name, tensor in tensors.items() if not self.drops(name)}

    def to_theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors under their current published names."""
        return {self.spellings(name)[0]: tensor for name, tensor in tensors.items()}

    def to_ours(self, tensors: Mapping[str, Tensor], names: Iterable[str],
                path: Path | None = None) -> dict[str, Tensor]:
        """Their tensors under our `names`. Raises `CheckpointError` for a missing, doubled or unknown one."""
        left, found, missing = dict(tensors), {}, []
        for name in names:
            there = [spelling for spelling in self.spellings(name) if spelling in left]
            if len(there) > 1:
                raise CheckpointError("the same tensor is there twice, in an old and a new spelling",
                                      path=path, key=" and ".join(there))
            if there:
                found[name] = left.pop(there[0])
            else:
                missing.append(self.spellings(name)[0])
        unknown = [name for name in left if not self.drops(name)]
        if missing or unknown:
            faults = [f"{len(keys)} {what}: {listed(keys)}" for keys, what in
                      ((missing, "tensors missing"), (unknown, "unknown tensors")) if keys]
            raise CheckpointError("; ".join(faults), path=path, key=(missing or unknown)[0])
        return found


def listed(keys: list[str]) -> str:
    return ", ".join(keys[:10]) + (", ..." if len(keys) > 10 else "")
