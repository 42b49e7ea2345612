"""The engine that translates tensor names: rows in, both directions out.

A row says what one module or tensor of ours is called over there. We always start from our own
names and ask for their spelling, so no name is ever parsed: the row whose name is the longest
beginning of ours decides, and what follows it is the same on both sides. A fork's own parameters
are therefore saved under the place they live in, and found there again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError


class Dialect(Enum):
    """The languages that files speak of the same tensors."""

    OURS = "imvar's names"
    PUBLISHED = "diffusers' names"
    ORIGINAL = "the original names"
    DOTLESS = "the original names without dots"  # as the original code's moving average keeps them


class Transform:
    """How a tensor of ours lies in one of theirs; this one, as it is."""

    index = 0  # its place among those that share one of theirs

    def take(self, theirs: Tensor) -> Tensor:
        """Ours out of theirs."""
        return theirs

    def give(self, ours: Tensor) -> Tensor:
        """Theirs of ours, or our share of it."""
        return ours


class Transposed(Transform):
    """A matrix that is applied from the right over there."""

    def take(self, theirs: Tensor) -> Tensor:
        return theirs.mT.contiguous() if theirs.ndim == 2 else theirs

    def give(self, ours: Tensor) -> Tensor:
        return ours.mT


class Pointwise(Transform):
    """A linear layer that is a 1x1 convolution over there. Biases are the same."""

    def take(self, theirs: Tensor) -> Tensor:
        return theirs[:, :, 0, 0] if theirs.ndim == 4 and theirs.shape[2:] == (1, 1) else theirs

    def give(self, ours: Tensor) -> Tensor:
        return ours[:, :, None, None] if ours.ndim == 2 else ours


@dataclass(frozen=True)
class Chunk(Transform):
    """One of `of` equal pieces, stacked along the first dimension over there."""

    index: int  # type: ignore[misc]
    of: int = 3

    def take(self, theirs: Tensor) -> Tensor:
        rows = len(theirs) // self.of if theirs.ndim and len(theirs) % self.of == 0 else 0
        return theirs[self.index * rows : (self.index + 1) * rows] if rows else theirs


AS_IS, TRANSPOSED, POINTWISE = Transform(), Transposed(), Pointwise()


@dataclass(frozen=True)
class KeyRow:
    """One place: our name, the published name, its older spellings, and the original name and form if they differ."""

    ours: str
    theirs: str
    older: tuple[str, ...] = ()
    original: str | None = None
    form: Transform = AS_IS

    @property
    def spellings(self) -> tuple[str, ...]:
        return (self.theirs, *self.older)


def nest(place: KeyRow, rows: Iterable[KeyRow]) -> Iterator[KeyRow]:
    """The place, and the rows that lie in it."""
    yield place
    for row in rows:
        theirs = [f"{outer}.{inner}" for outer in place.spellings for inner in row.spellings]
        original = f"{place.original or place.theirs}.{row.original or row.theirs}"
        yield KeyRow(f"{place.ours}.{row.ours}", theirs[0], tuple(theirs[1:]), original, row.form)


@dataclass(frozen=True)
class Naming:
    """How a file calls the tensors of a part: a dialect, behind a prefix."""

    dialect: Dialect = Dialect.PUBLISHED
    prefix: str = ""


PUBLISHED = Naming()


@dataclass(frozen=True)
class Source:
    """Where a tensor of ours lies: in which tensor of the file, and how."""

    name: str
    form: Transform = AS_IS


class Keymap:
    """The dictionary of one model.

    `droppable` lists, by dialect, patterns of what a file may hold beside the weights.
    """

    def __init__(self, rows: Iterable[KeyRow], droppable: Mapping[Dialect, Collection[str]] | None = None):
        self.rows = {row.ours: row for row in rows}
        self.droppable = droppable or {}

    def row(self, ours: str) -> KeyRow:
        """The row of a tensor of ours: that of its place, with the rest of its name on either side."""
        place, rest = ours, ""
        while place not in self.rows:
            if not place:
                return KeyRow(ours, ours)
            place, _, last = place.rpartition(".")
            rest = f".{last}{rest}"
        row = self.rows[place]
        return KeyRow(
            ours,
            row.theirs + rest,
            tuple(name + rest for name in row.older),
            (row.original or row.theirs) + rest,
            row.form,
        )

    def sources(self, ours: str, naming: Naming = PUBLISHED) -> list[Source]:
        """Where a tensor of ours may be found in a file, the spelling that is written first."""
        if naming.dialect is Dialect.OURS:
            return [Source(naming.prefix + ours)]
        row = self.row(ours)
        if naming.dialect is Dialect.PUBLISHED:
            return [Source(naming.prefix + name) for name in row.spellings]
        original = row.original or row.theirs
        dotted = naming.dialect is Dialect.ORIGINAL
        return [Source(naming.prefix + (original if dotted else original.replace(".", "")), row.form)]

    def spelled(self, ours: str) -> str:
        """The published name of a tensor of ours."""
        return self.row(ours).theirs

    def drops(self, theirs: str, naming: Naming = PUBLISHED) -> str | None:
        """The pattern by which a file may hold this tensor without the model having a use for it; None without one."""
        name = theirs.removeprefix(naming.prefix)
        patterns = self.droppable.get(naming.dialect, ())
        return next((naming.prefix + pattern for pattern in patterns if fnmatchcase(name, pattern)), None)

    def renamed(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Whichever of `tensors` have a published name, under our `names`; the rest as they are."""
        ours = {source.name: name for name in names for source in self.sources(name)}
        return {ours.get(name, name): tensor for name, tensor in tensors.items() if not self.drops(name)}

    def to_theirs(self, tensors: Mapping[str, Tensor], naming: Naming = PUBLISHED) -> dict[str, Tensor]:
        """Our tensors as a file of that naming has them."""
        shares: dict[str, dict[int, Tensor]] = {}
        for name, tensor in tensors.items():
            source = self.sources(name, naming)[0]
            shares.setdefault(source.name, {})[source.form.index] = source.form.give(tensor)
        return {
            name: parts[0] if len(parts) == 1 else torch.cat([parts[i] for i in sorted(parts)])
            for name, parts in shares.items()
        }

    def to_ours(
        self, tensors: Mapping[str, Tensor], names: Iterable[str], naming: Naming = PUBLISHED, path: Path | None = None
    ) -> dict[str, Tensor]:
        """Their tensors under our `names`. Raises `CheckpointError` for a missing, doubled or unknown one."""
        found, used, missing = {}, set(), []
        for name in names:
            sources = self.sources(name, naming)
            there = [source for source in sources if source.name in tensors]
            if len(there) > 1:
                raise CheckpointError(
                    "the same tensor is there twice, in an old and a new spelling",
                    path=path,
                    key=" and ".join(source.name for source in there),
                )
            if there:
                found[name] = there[0].form.take(tensors[there[0].name])
                used.add(there[0].name)
            elif sources[0].name not in missing:
                missing.append(sources[0].name)
        unknown = [name for name in tensors if name not in used and not self.drops(name, naming)]
        if missing or unknown:
            faults = [
                f"{len(keys)} {what.format('s' * (len(keys) > 1))}: {abbreviate(keys)}"
                for keys, what in ((missing, "tensor{} missing"), (unknown, "unknown tensor{}"))
                if keys
            ]
            raise CheckpointError("; ".join(faults), path=path, key=(missing or unknown)[0])
        return found


def abbreviate(keys: list[str]) -> str:
    return ", ".join(keys[:10]) + (", ..." if len(keys) > 10 else "")
