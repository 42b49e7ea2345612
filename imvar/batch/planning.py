"""The plan of a batch: its settings and its items in shards, fixed before anything is made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..atomic.file import write_text
from ..atomic.filesystem import locked
from ..checks import as_path
from ..errors import CheckpointError, InputError, first_line, invalid
from .inputs import Item, find_items
from .processes import process_name
from .settings import Settings, setting_differences

FOLDER, NAME, FORMAT = "plan", "plan.json", 1


@dataclass(frozen=True)
class Part:
    """The items that one call of `run` or `extend` added: a file of JSON lines, with the digest of its content."""

    file: str
    items: int
    shards: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Plan:
    """The settings and the items of a batch. Shard i is a pure function of the plan and of i.

    `folder`: the plan's own, in the output folder of the batch.
    """

    folder: Path
    settings: Settings
    parts: tuple[Part, ...]

    def __len__(self) -> int:
        """Return the number of shards."""
        return sum(part.shards for part in self.parts)

    @property
    def items(self) -> int:
        """The number of inputs."""
        return sum(part.items for part in self.parts)

    def shard(self, number: int) -> list[Item]:
        """Return the items of a shard."""
        return [json.loads(line) for line in self.lines(number)]

    def digest(self, number: int) -> str:
        """Return the digest of the settings and of the items of a shard."""
        text = self.settings.json_text().encode() + b"\n" + b"".join(self.lines(number))
        return hashlib.sha256(text).hexdigest()

    def lines(self, number: int) -> list[bytes]:
        """Return the lines of the items of a shard."""
        for part, offsets in zip(self.parts, self.offsets, strict=True):
            if number < part.shards:
                with (self.folder / part.file).open("rb") as file:
                    file.seek(offsets[number])
                    return file.read(offsets[number + 1] - offsets[number]).splitlines(keepends=True)
            number -= part.shards
        raise invalid(InputError, "shard", f"a number below {len(self)}", str(number))

    @cached_property
    def offsets(self) -> list[list[int]]:
        """Where each shard begins in the file of its part, and where the last one ends."""
        return [checked_offsets(self.folder / part.file, part, self.settings.shard) for part in self.parts]

    def json_text(self) -> str:
        """Return what `plan.json` contains."""
        content = {"format": FORMAT, "settings": asdict(self.settings), "parts": [asdict(part) for part in self.parts]}
        return json.dumps(content, indent=1) + "\n"


def checked_offsets(path: Path, part: Part, shard: int) -> list[int]:
    """Return where each shard begins in a file of items. Raises `CheckpointError` for a file that has changed."""
    offsets, position, digest, count = [], 0, hashlib.sha256(), 0
    with path.open("rb") as file:
        for count, line in enumerate(file, 1):
            if count % shard == 1 or shard == 1:
                offsets.append(position)
            position += len(line)
            digest.update(line)
    if (count, digest.hexdigest()) != (part.items, part.sha256):
        raise invalid(CheckpointError, path, f"the {part.items} items of the plan", "a file that has changed")
    return [*offsets, position]


def make_plan(
    inputs: str | Path | Iterable[str | Path], out: str | Path, *, shared: Item | None = None, **settings: Any
) -> Plan:
    """Fix the plan of a batch in `out`, and return it; an existing plan is returned if it is the same.

    Args:
        inputs: folders, patterns, image and embedding files, JSON lines (.jsonl), tar and parquet files.
        out: the output folder, created if needed.
        shared: conditions of all items that do not have them: `negative`, `init`, `strength` and `mask`.
        settings: fields of `Settings`.

    Raises `InputError` for inputs without images, ids that repeat, and a folder with another plan.
    """
    out = Path(os.path.abspath(as_path("out", out)))
    wanted = Settings.resolved(**settings)
    temporary = out / f".{FOLDER}.{process_name()}.tmp"
    temporary.mkdir(parents=True)
    try:
        part = write_part(temporary / "items-0.jsonl", find_items(as_list(inputs), shared), wanted.shard, set())
        plan = Plan(out / FOLDER, wanted, (part,))
        (temporary / NAME).write_text(plan.json_text(), encoding="utf-8")
        try:
            temporary.rename(plan.folder)  # fails if there is a plan
        except OSError:
            if not (plan.folder / NAME).exists():
                raise
        else:
            return plan
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    existing = open_plan(out)
    if differing := setting_differences(asdict(existing.settings), asdict(wanted)):
        got = f"another (its value and this command's): {'; '.join(differing)}"
        raise invalid(InputError, out, "the batch of this command", got, "use another -o FOLDER")
    if existing.parts[0] != part:
        got = f"one of {existing.parts[0].items} inputs, or of other ones"
        raise invalid(InputError, out, f"a batch of these {part.items} inputs", got, "imvar batch extend adds inputs")
    return existing


def open_plan(out: str | Path) -> Plan:
    """Return the plan of an output folder. Raises `InputError` where there is none, and for a broken one."""
    folder = Path(os.path.abspath(as_path("out", out))) / FOLDER
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        parts = tuple(Part(**part) for part in content["parts"])
        if content["format"] != FORMAT:
            raise invalid(InputError, path, f"format {FORMAT}", str(content["format"]), "use the imvar that made it")
        return Plan(folder, Settings(**content["settings"]), parts)
    except FileNotFoundError as error:
        raise invalid(InputError, out, "the output folder of imvar batch run", "a folder without a plan") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise invalid(InputError, path, "the plan of a batch", first_line(error)) from error


def extend_plan(out: str | Path, inputs: str | Path | Iterable[str | Path], *, shared: Item | None = None) -> Plan:
    """Add inputs to the plan of a batch, in shards of their own, and return it."""
    folder = open_plan(out).folder
    with locked(folder / ".lock"):
        plan = open_plan(out)
        known = {item["id"] for number in range(len(plan)) for item in plan.shard(number)}
        name = f"items-{len(plan.parts)}.jsonl"
        part = write_part(folder / name, find_items(as_list(inputs), shared), plan.settings.shard, known)
        longer = Plan(folder, plan.settings, (*plan.parts, part))
        write_text(folder / NAME, longer.json_text())
    return longer


def as_list(inputs: str | Path | Iterable[str | Path]) -> Sequence[str | Path]:
    """Return the inputs as a list."""
    return [inputs] if isinstance(inputs, (str, Path)) else list(inputs)


def write_part(path: Path, items: Iterator[Item], shard: int, known: set[str]) -> Part:
    """Write items to a file of JSON lines, and return the part of the plan that it is."""
    digest, count = hashlib.sha256(), 0
    with path.open("wb") as file:
        for item in items:
            if item["id"] in known:
                hint = "pass a pattern such as 'photos/*/*.jpg', whose ids are whole paths, or a .jsonl file with ids"
                raise invalid(InputError, "inputs", "a different id for each", f"{item['id']} twice", hint)
            known.add(item["id"])
            line = json.dumps(item, separators=(",", ":")).encode() + b"\n"
            digest.update(line)
            file.write(line)
            count += 1
        file.flush()
        os.fsync(file.fileno())
    if not count:
        raise invalid(InputError, "inputs", "at least one", "none")
    return Part(path.name, count, -(-count // shard), digest.hexdigest())
