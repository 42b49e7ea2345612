"""The end of a batch: check all markers, write the manifest, verify files, and report."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .bucket import BucketPath, Location
from .planning import Plan
from .store import Marker, Store, file_sha256, listed, sha256

MANIFEST, ERRORS = "manifest.jsonl", "errors.jsonl"
SAMPLE = 100  # markers from which the size of the remaining images is estimated
BESIDE = 2048  # bytes that an image takes beside its own: half a block of the disk


@dataclass(frozen=True)
class Report:
    """The result of a batch: `made` images, of which `flagged`, and `errors` of its `inputs`.

    `done` of `shards`; `manifest` has a line for each image and `errors_file` for each error, once all are done.
    """

    inputs: int
    shards: int
    done: int
    made: int
    flagged: int
    errors: int
    bytes: int
    manifest: Location
    errors_file: Location


def markers(store: Store, plan: Plan) -> Iterator[tuple[int, Marker | None]]:
    """Yield the number of each shard and its marker, if that is one of this plan."""
    numbers = range(len(plan))
    yield from zip(numbers, store.map(partial(plan_marker, store, plan), numbers), strict=True)


def plan_marker(store: Store, plan: Plan, number: int) -> Marker | None:
    """Return the marker of a shard, if that is one of this plan."""
    marker = store.marker(number)
    return marker if marker and marker.plan == plan.digest(number) else None


def is_bad(store: Store, plan: Plan, number: int) -> bool:
    """Return whether the marker or the rows of a shard are missing, broken, or of another plan."""
    return marked_lines(store, plan, number) is None


def bad_shards(store: Store, plan: Plan, numbers: Sequence[int]) -> set[int]:
    """Return those shards that are bad."""
    found = store.map(partial(is_bad, store, plan), numbers)
    return {number for number, bad in zip(numbers, found, strict=True) if bad}


def marked_lines(store: Store, plan: Plan, number: int) -> tuple[Marker, list[bytes]] | None:
    """Return the marker and the rows of a shard as lines of JSON; None if it is bad."""
    marker = plan_marker(store, plan, number)
    lines = marker and store.row_lines(marker)
    return None if marker is None or lines is None else (marker, lines)


def spoiled_files(store: Store, plan: Plan) -> Iterator[tuple[int, str]]:
    """Yield each shard and file of it that is missing or not as it was written, and shards without a whole marker."""
    for number, marker in markers(store, plan):
        rows = marker and store.shard_rows(marker)
        if marker is None or rows is None:
            yield number, store.path("done", number, ".json").relative_to(store.folder).as_posix()
        elif marker.data is not None:
            path = store.path("shards", number, f".{plan.settings.format}")
            if file_sha256(path) != marker.data:
                yield number, path.relative_to(store.folder).as_posix()
        else:
            for row in rows:
                if "file" in row and file_sha256(store.folder / row["file"]) != row["sha256"]:
                    yield number, row["file"]


def spoiled_summaries(store: Store, plan: Plan) -> list[str]:
    """Return which of the manifest and the file of errors of a finished batch are not the rows of its shards."""
    failed: list[bytes] = []
    digest = hashlib.sha256()
    for line in manifest_lines(store, plan, failed, []):
        digest.update(line)
    expected = {MANIFEST: digest.hexdigest(), ERRORS: sha256(b"".join(failed))}
    return [name for name, value in expected.items() if file_sha256(store.folder / name) != value]


def write_manifest(store: Store, plan: Plan) -> bool:
    """Write the rows of all shards, those of images and those of errors each into a file.

    Returns False if a shard has been opened again since its marker was checked.
    """
    failed: list[bytes] = []
    bad: list[int] = []
    store.put(store.folder / MANIFEST, manifest_lines(store, plan, failed, bad))
    store.put(store.folder / ERRORS, failed)
    store.flush_files([store.folder / MANIFEST, store.folder / ERRORS])
    return not bad


def manifest_lines(store: Store, plan: Plan, failed: list[bytes], bad: list[int]) -> Iterator[bytes]:
    """Yield the rows of all images, with the number of the shard; append those of errors to `failed`.

    Shards without rows are appended to `bad`.
    """
    for number, whole in enumerate(store.map(partial(marked_lines, store, plan), range(len(plan)))):
        if whole is None:
            bad.append(number)
            continue
        marker, found = whole
        lines = [b'%s,"shard":%d}\n' % (line[:-1], number) for line in found]
        yield from lines[: marker.made]
        failed += lines[marker.made :]


def batch_report(store: Store, plan: Plan) -> Report:
    """Return what is made of a plan so far."""
    names, totals = ("made", "flagged", "errors", "bytes"), Counter[str]()
    for _, marker in markers(store, plan):
        if marker:
            totals.update({"done": 1, **{name: getattr(marker, name) for name in names}})
    return Report(
        inputs=plan.items,
        shards=len(plan),
        **{name: totals[name] for name in ("done", *names)},
        manifest=store.folder / MANIFEST,
        errors_file=store.folder / ERRORS,
    )


def reopen_errors(store: Store, plan: Plan) -> list[int]:
    """Remove the markers of the shards that have errors, and return their numbers."""
    numbers = [number for number, marker in markers(store, plan) if marker and marker.errors]
    for number in numbers:
        store.reopen(number)
    return numbers


def bytes_needed(store: Store, plan: Plan) -> int | None:
    """Return about how many bytes the images take that are not made yet; None as long as there is none to judge by.

    Images of shards that are not done count as missing, less the room that they take: they are written again.
    """
    if isinstance(store.folder, BucketPath):
        return None
    done = sorted(store.done())
    sample = [plan_marker(store, plan, number) for number in done[:: -(-len(done) // SAMPLE) or 1]]
    found = [marker for marker in sample if marker and marker.made]
    missing = set(range(len(plan))).difference(done)
    folders = [Path(store.path("images", number)) for number in missing]
    folders += [path for path in (store.folder / "workers").glob("*/*") if path.is_dir()]
    present = [size for folder in folders for size in sizes_of_files(folder)]
    images, total = len(present), sum(present)
    if found:
        images = sum(marker.made for marker in found)
        total = sum(marker.bytes + marker.made * BESIDE for marker in found)
    if not images:
        return None
    wanted = total / images * plan.items * plan.settings.n * len(missing) / len(plan)
    return max(0, round(wanted) - sum(present))


def sizes_of_files(folder: Path) -> list[int]:
    """Return about what each file in a folder takes on the disk, in bytes."""
    sizes = []
    for name in listed(folder):
        with suppress(OSError):
            sizes.append((folder / name).stat().st_size + BESIDE)
    return sizes
