"""The engine that translates tensor names between the published layout, older spellings and the original files.

A model's own names are the published ones. A row of the table has the other names of one module or tensor. Every
lookup starts from the model's names, so no name is parsed: the row with the longest matching prefix decides, and the
rest of the name is the same on both sides. A fork's additional parameters are therefore saved under the module that
they belong to, and found there again.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, invalid
from .mapped import copy_mapped


class Dialect(Enum):
    """The sets of names in which files spell the same tensors."""

    PUBLISHED = "diffusers' names"
    ORIGINAL = "the original names"
    DOTLESS = "the original names without dots"  # as the original code's moving average (EMA) keeps them


class Transform:
    """How a tensor of the model is stored in a file; this one, unchanged."""

    index = 0  # its position among the tensors that are stored in one

    def load(self, stored: Tensor) -> Tensor:
        """Return the model's tensor from the stored one."""
        return stored

    def save(self, tensor: Tensor) -> Tensor:
        """Return the stored tensor, or this tensor's part of it."""
        return tensor


class Transposed(Transform):
    """A matrix that the original code multiplies from the right."""

    def load(self, stored: Tensor) -> Tensor:
        return copy_mapped(stored).mT.contiguous() if stored.ndim == 2 else stored

    def save(self, tensor: Tensor) -> Tensor:
        return tensor.mT


class Pointwise(Transform):
    """A linear layer that the original code has as a 1x1 convolution. Biases are the same."""

    def load(self, stored: Tensor) -> Tensor:
        return stored[:, :, 0, 0] if stored.ndim == 4 and stored.shape[2:] == (1, 1) else stored

    def save(self, tensor: Tensor) -> Tensor:
        return tensor[:, :, None, None] if tensor.ndim == 2 else tensor


@dataclass(frozen=True)
class Chunk(Transform):
    """One of `of` equal chunks, stored as one tensor along the first dimension."""

    index: int  # type: ignore[misc]
    of: int = 3

    def load(self, stored: Tensor) -> Tensor:
        rows = len(stored) // self.of if stored.ndim and len(stored) % self.of == 0 else 0
        return stored[self.index * rows : (self.index + 1) * rows] if rows else stored


AS_IS, TRANSPOSED, POINTWISE = Transform(), Transposed(), Pointwise()


@dataclass(frozen=True)
class KeyRow:
    """A module or tensor: its published name, older spellings, and the original name and transform if they differ."""

    name: str
    older: tuple[str, ...] = ()
    original: str | None = None
    transform: Transform = AS_IS

    @property
    def spellings(self) -> tuple[str, ...]:
        return (self.name, *self.older)


def nest(parent: KeyRow, rows: Iterable[KeyRow]) -> Iterator[KeyRow]:
    """Yield the parent, and the rows with their names prefixed by the parent's."""
    yield parent
    for row in rows:
        name, *older = [f"{outer}.{inner}" for outer in parent.spellings for inner in row.spellings]
        original = f"{parent.original or parent.name}.{row.original or row.name}"
        yield KeyRow(name, tuple(older), original, row.transform)


@dataclass(frozen=True)
class Naming:
    """How a file names the tensors of a part: a dialect, after a prefix."""

    dialect: Dialect = Dialect.PUBLISHED
    prefix: str = ""


PUBLISHED = Naming()


@dataclass(frozen=True)
class Source:
    """Where a tensor of the model is stored: under which name, and how."""

    name: str
    transform: Transform = AS_IS


class Keymap:
    """The table of one model.

    `droppable` lists, by dialect, patterns of tensors that a file may hold in addition to the weights.
    """

    def __init__(self, rows: Iterable[KeyRow], droppable: Mapping[Dialect, Collection[str]] | None = None):
        self.rows: dict[str, KeyRow] = {row.name: row for row in rows}
        self.droppable: Mapping[Dialect, Collection[str]] = droppable or {}

    def row(self, name: str) -> KeyRow:
        """Return the row of a tensor: that of the innermost module that has one, extended by the rest of its name."""
        module, rest = name, ""
        while module not in self.rows:
            if not module:
                return KeyRow(name)
            module, _, last = module.rpartition(".")
            rest = f".{last}{rest}"
        row = self.rows[module]
        older = tuple(spelling + rest for spelling in row.older)
        return KeyRow(name, older, (row.original or row.name) + rest, row.transform)

    def sources(self, name: str, naming: Naming = PUBLISHED) -> list[Source]:
        """Return where a tensor may be stored in a file, the spelling that is written first."""
        row = self.row(name)
        if naming.dialect is Dialect.PUBLISHED:
            return [Source(naming.prefix + spelling) for spelling in row.spellings]
        original = row.original or name
        dotted = naming.dialect is Dialect.ORIGINAL
        return [Source(naming.prefix + (original if dotted else original.replace(".", "")), row.transform)]

    def find_source(self, name: str, naming: Naming, stored: Container[str]) -> Source | None:
        """Return where a file with tensors of the names `stored` has the model's tensor `name`; None if it has not."""
        return next((source for source in self.sources(name, naming) if source.name in stored), None)

    def droppable_pattern(self, key: str, naming: Naming = PUBLISHED) -> str | None:
        """Return the pattern by which a file may hold this tensor without the model needing it, if any."""
        name = key.removeprefix(naming.prefix)
        patterns = self.droppable.get(naming.dialect, ())
        return next((naming.prefix + pattern for pattern in patterns if fnmatchcase(name, pattern)), None)

    def modernize(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Return `tensors` with older spellings of the model's `names` replaced, and droppable ones left out."""
        current = {source.name: name for name in names for source in self.sources(name)}
        return {current.get(key, key): value for key, value in tensors.items() if not self.droppable_pattern(key)}

    def to_file(self, tensors: Mapping[str, Tensor], naming: Naming = PUBLISHED) -> dict[str, Tensor]:
        """Return the model's tensors as a file with that naming stores them."""
        chunks: dict[str, dict[int, Tensor]] = {}
        for name, tensor in tensors.items():
            source = self.sources(name, naming)[0]
            chunks.setdefault(source.name, {})[source.transform.index] = source.transform.save(tensor)
        return {
            key: parts[0] if len(parts) == 1 else torch.cat([parts[i] for i in sorted(parts)])
            for key, parts in chunks.items()
        }

    def from_file(
        self, tensors: Mapping[str, Tensor], names: Iterable[str], naming: Naming = PUBLISHED, path: Path | None = None
    ) -> dict[str, Tensor]:
        """Return a file's tensors under the model's `names`.

        Raises `CheckpointError` for tensors that are missing, unknown, or there in two spellings.
        """
        result, used, missing = {}, set(), []
        for name in names:
            sources = self.sources(name, naming)
            present = [source for source in sources if source.name in tensors]
            if len(present) > 1:
                keys = " and ".join(source.name for source in present)
                expected = "one spelling of each tensor"
                raise invalid(CheckpointError, path, expected, "the same tensor in an old and a new one", key=keys)
            if present:
                result[name] = present[0].transform.load(tensors[present[0].name])
                used.add(present[0].name)
            elif sources[0].name not in missing:
                missing.append(sources[0].name)
        unknown = [key for key in tensors if key not in used and not self.droppable_pattern(key, naming)]
        if missing or unknown:
            faults = [
                f"{len(keys)} {what.format('s' * (len(keys) > 1))}: {abbreviate(keys)}"
                for keys, what in ((missing, "tensor{} missing"), (unknown, "unknown tensor{}"))
                if keys
            ]
            expected = "exactly the tensors of the model"
            raise invalid(CheckpointError, path, expected, "; ".join(faults), key=(missing or unknown)[0])
        return result


def abbreviate(keys: list[str]) -> str:
    return ", ".join(keys[:10]) + (", ..." if len(keys) > 10 else "")
