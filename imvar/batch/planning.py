"""The plan of a batch: its settings and its items in shards, fixed before anything is made."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..atomic.file import exclusive, sync, write_text
from ..errors import InputError, InputTypeError, first_line, invalid, short_repr
from .bucket import BucketPath, Location, absolute, location, place_file
from .inputs import Item, checked_shared, find_items, import_pyarrow
from .settings import Settings, setting_differences
from .store import FULL, TEMPORARY

FOLDER, NAME, FORMAT = "plan", "plan.json", 1
ENVIRONMENT = "environment.json"  # beside it, of the first worker


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

    folder: Location
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
        first = 0
        for part, offsets in zip(self.parts, self.offsets, strict=True):
            if 0 <= (index := number - first) < part.shards:
                with self.open_part(part) as file:
                    file.seek(offsets[index])
                    return file.read(offsets[index + 1] - offsets[index]).splitlines(keepends=True)
            first += part.shards
        raise invalid(InputError, "shard", f"a number from 0 to {first - 1}", str(number))

    def open_part(self, part: Part) -> BinaryIO:
        """Return the file of a part. One in an object store is read whole, once."""
        path = self.folder / part.file
        if not isinstance(path, BucketPath):
            return path.open("rb")
        if part.file not in self.kept_parts:
            self.kept_parts[part.file] = path.read_bytes()
        return io.BytesIO(self.kept_parts[part.file])

    @cached_property
    def kept_parts(self) -> dict[str, bytes]:
        """The files in an object store, by name."""
        return {}

    @cached_property
    def offsets(self) -> list[list[int]]:
        """Where each shard begins in the file of its part, and where the last one ends."""
        return [checked_offsets(self, part) for part in self.parts]

    def json_text(self) -> str:
        """Return what `plan.json` contains."""
        content = {"format": FORMAT, "settings": asdict(self.settings), "parts": [asdict(part) for part in self.parts]}
        return json.dumps(content, indent=1) + "\n"


def checked_offsets(plan: Plan, part: Part) -> list[int]:
    """Return where each shard begins in the file of a part. Raises `InputError` for a file that has changed."""
    offsets, position, digest, count = [], 0, hashlib.sha256(), 0
    try:
        with plan.open_part(part) as file:
            for count, line in enumerate(file, 1):
                if (count - 1) % plan.settings.shard == 0:
                    offsets.append(position)
                position += len(line)
                digest.update(line)
    except FileNotFoundError:
        pass
    if (count, digest.hexdigest()) != (part.items, part.sha256):
        got = "a file that has changed" if count else "none"
        path, hint = plan.folder / part.file, "restore it, or use another -o"
        raise invalid(InputError, path, f"the {part.items} inputs of the plan", got, hint)
    return [*offsets, position]


def make_plan(
    inputs: str | Path | Iterable[str | Path],
    out: str | Location,
    *,
    shared: Item | None = None,
    **settings: Any,
) -> Plan:
    """Fix the plan of a batch in `out`, and return it; an existing plan is returned if it is the same.

    Args:
        inputs: folders, patterns, image and embedding files, JSON lines (.jsonl), tar and parquet files.
        out: the output folder, created if needed, or an address in an object store such as "s3://bucket/variations".
        shared: conditions of all items that do not have them: `negative`, `init`, `strength`, `mask` and `preprocess`.
        settings: fields of `Settings`.

    Raises `InputError` for inputs without images, ids that repeat, and a folder with another plan.
    """
    folder, wanted = plan_folder(out), Settings.resolved(**settings)
    conditions = checked_shared(shared)
    if wanted.format == "parquet":
        import_pyarrow("format")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in FULL:
            raise
        raise invalid(InputError, folder.parent, "a folder that can be written to", first_line(error)) from error
    try:
        with changing(folder) as temporary:
            existing = same_plan(out, wanted) if (folder / NAME).exists() else None
            part, _ = write_part(temporary / "items-0.jsonl", inputs, conditions, folder.parent, wanted.shard)
            plan = Plan(folder, wanted, (part,))
            if existing is None and not place_plan(temporary, plan):
                existing = same_plan(out, wanted)
            if existing and existing.parts[0] != part:
                got = f"one of {existing.parts[0].items} inputs, or of other ones"
                hint = "imvar batch extend adds inputs"
                raise invalid(InputError, out, f"a batch of these {part.items} inputs", got, hint)
            return existing or plan
    finally:
        with suppress(OSError):  # unless it is empty, after an error
            folder.parent.rmdir()


def plan_folder(out: str | Location) -> Location:
    """Return the folder of the plan in an output folder."""
    return absolute(location("out", out)) / FOLDER


@contextmanager
def changing(folder: Location) -> Iterator[Path]:
    """Create a temporary folder for the block, in which no other process of this machine changes the same plan."""
    if isinstance(folder, BucketPath):
        with tempfile.TemporaryDirectory(prefix=TEMPORARY) as temporary:
            yield Path(temporary)
        return
    with exclusive(folder, folder.parent) as path:
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def same_plan(out: str | Location, wanted: Settings) -> Plan:
    """Return the existing plan of an output folder. Raises `InputError` for one with other settings."""
    existing = open_plan(out)
    if differing := setting_differences(asdict(existing.settings), asdict(wanted)):
        got = f"another (its value and this command's): {'; '.join(differing)}"
        is_begun = (existing.folder / ENVIRONMENT).exists()
        unused = "" if is_begun else f", or delete {existing.folder}: nothing is made of it yet"
        raise invalid(InputError, out, "the batch of this command", got, f"use another -o FOLDER{unused}")
    return existing


def place_plan(temporary: Path, plan: Plan) -> bool:
    """Write a new plan, whose items are in a temporary folder; return whether no other process has just written one."""
    if isinstance(plan.folder, BucketPath):
        for part in plan.parts:
            place_file(temporary / part.file, plan.folder / part.file)
        return (plan.folder / NAME).put_new(plan.json_text().encode())
    write_text(temporary / NAME, plan.json_text())
    temporary.rename(plan.folder)
    sync(plan.folder.parent)
    return True


def open_plan(out: str | Location) -> Plan:
    """Return the plan of an output folder. Raises `InputError` where there is none, and for a broken one."""
    folder = plan_folder(out)
    path = folder / NAME
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise invalid(InputError, path, f"format {FORMAT}", str(content["format"]), "use the imvar that made it")
        parts = tuple(Part(**part) for part in content["parts"])
        return Plan(folder, Settings(**content["settings"]), parts)
    except FileNotFoundError as error:
        raise invalid(InputError, out, "the output folder of imvar batch run", "a folder without a plan") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, InputError) and error.key == str(path):
            raise
        raise invalid(InputError, path, "the plan of a batch", first_line(error)) from error


def extend_plan(out: str | Location, inputs: str | Path | Iterable[str | Path], *, shared: Item | None = None) -> Plan:
    """Add inputs to the plan of a batch, in shards of their own, and return it.

    Inputs that were added before by such a call are not added again. Raises `InputError` for other ids that repeat.
    """
    folder, conditions = open_plan(out).folder, checked_shared(shared)
    with changing(folder) as temporary:
        plan = open_plan(out)
        name = f"items-{len(plan.parts)}.jsonl"
        part, hashes = write_part(temporary / name, inputs, conditions, folder.parent, plan.settings.shard)
        if any(part.sha256 == known.sha256 for known in plan.parts):
            return plan
        before: list[Location] = [folder / known.file for known in plan.parts]
        hashes.extend(hash(json.loads(line)["id"]) for line in read_lines(before))
        check_ids(hashes, [*before, temporary / name])
        place_file(temporary / name, folder / name)
        longer = Plan(folder, plan.settings, (*plan.parts, part))
        if isinstance(folder, BucketPath):
            (folder / NAME).write_bytes(longer.json_text().encode())
        else:
            write_text(folder / NAME, longer.json_text())
    return longer


def write_part(
    path: Path, inputs: str | Path | Iterable[str | Path], shared: Item, out: Location, shard: int
) -> tuple[Part, array[int]]:
    """Write the items of inputs to a file of JSON lines; return the part of the plan that it is, and hashes of ids."""
    given = [inputs] if isinstance(inputs, (str, Path)) else inputs
    if not isinstance(given, Iterable):
        raise invalid(InputTypeError, "inputs", "a path or a list of them", short_repr(inputs))
    digest, hashes = hashlib.sha256(), array("q")
    with path.open("wb") as file:
        for item in find_items(given, shared, out):
            hashes.append(hash(item["id"]))
            line = json.dumps(item, separators=(",", ":")).encode() + b"\n"
            digest.update(line)
            file.write(line)
    if not hashes:
        raise invalid(InputError, "inputs", "at least one", "none")
    check_ids(hashes, [path])
    sync(path)
    return Part(path.name, len(hashes), -(-len(hashes) // shard), digest.hexdigest()), hashes


def check_ids(hashes: array[int], paths: Sequence[Location]) -> None:
    """Raise `InputError` if an id repeats in files of items.

    `hashes`: of all ids, 8 bytes each; they are sorted here, and only where some are equal the ids are compared.
    """
    values = np.frombuffer(hashes, np.int64)
    values.sort()
    repeated, seen = set(values[1:][values[1:] == values[:-1]].tolist()), set[str]()
    for line in read_lines(paths) if repeated else ():
        identity = json.loads(line)["id"]
        if identity in seen:
            hint = (
                "pass a relative pattern such as 'photos/*/*.jpg', whose ids are whole paths, or a .jsonl file with ids"
            )
            raise invalid(InputError, "inputs", "a different id for each", f"{identity} twice", hint)
        if hash(identity) in repeated:
            seen.add(identity)


def read_lines(paths: Iterable[Location]) -> Iterator[bytes]:
    """Yield the lines of files."""
    for path in paths:
        with path.open("rb") as file:
            yield from file
