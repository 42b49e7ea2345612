"""Make a shard of a batch: a pure function of the plan and of the number of the shard.

Every call of the pipeline has exactly `batch` rows, filled up with blank ones, and each row has a seed of its own. So
the bytes of an image do not depend on its neighbours, of which some may be broken, nor on who makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ..errors import ImvarError, OutOfMemoryError, first_line, invalid
from ..oom import explain_out_of_memory
from .bucket import BucketError, Location, location
from .conditions import OF_ONE, Condition, arguments_of_call, kind_of_item, open_item
from .exits import MISUSED
from .inputs import Item
from .journal import Journal
from .planning import Plan
from .settings import Settings
from .store import FullDiskError, Marker, Row, Store, rows_as_bytes, sha256
from .write import image_bytes, stems_of, writer_of

TRIES = 3
NOT_OF_INPUTS = (OutOfMemoryError, FullDiskError, BucketError)


class StoppedError(Exception):
    """The process was asked to end; nothing of the shard is lost but the work on it."""


@dataclass(frozen=True)
class CallLayout:
    """The rows of one call: (item of the shard, variation) each. `is_of_one`: they are of one item by design."""

    rows: tuple[tuple[int, int], ...]
    is_of_one: bool


def run_shard(
    out: str | Location | Store,
    plan: Plan,
    number: int,
    pipe: Any,
    stop: Callable[[], bool] = bool,
    tries: int = TRIES,
) -> Marker:
    """Make the images of a shard, and return its marker.

    Args:
        out: the output folder of the batch.
        plan: its plan.
        number: which shard, from 0.
        pipe: the pipeline, as `imvar.batch.pipeline_of` returns it.
        stop: a function that returns True once the process should end, asked before each call of the pipeline.
        tries: how often a process may die in a call with an input alone, before that becomes an error.

    Inputs that cannot be read become errors in the rows of the shard. Raises `StoppedError`, `FullDiskError` and
    `OutOfMemoryError`.
    """
    store = out if isinstance(out, Store) else Store(location("out", out))
    try:
        return ShardRun(store, plan, number, pipe, stop, tries).run()
    finally:
        if store is not out:
            store.remove_temporary()


class ShardRun:
    """One attempt at a shard."""

    def __init__(self, store: Store, plan: Plan, number: int, pipe: Any, stop: Callable[[], bool], tries: int):
        self.store, self.plan, self.number, self.pipe, self.stop, self.tries = store, plan, number, pipe, stop, tries
        self.settings, self.items = plan.settings, plan.shard(number)
        self.stems, self.journal = stems_of(self.items), Journal(store, number)
        self.rows: dict[tuple[int, int], Row] = {}
        self.errors: dict[int, str] = {}
        self.sizes: dict[tuple[int, int], int] = {}

    def run(self) -> Marker:
        for index, item in enumerate(self.items):
            if self.journal.deaths[item["id"]] > self.tries:
                deaths = self.journal.deaths[item["id"]]
                self.errors[index] = f"{deaths} processes died while they worked on it"
        self.writer = writer_of(self.settings.format, self.store, self.number)
        for layout in call_layouts(self.settings, self.items):
            self.run_layout(layout)
        return self.write_results()

    def run_layout(self, layout: CallLayout) -> None:
        """Make the images of a call; items in whose calls a process died at last, one at a time, to tell which it was.

        Those with the fewest deaths are first, so that an input that kills every process keeps back no other one.
        """
        indices = list(dict.fromkeys(index for index, _ in layout.rows if index not in self.errors))
        deaths = {index: self.journal.deaths[self.items[index]["id"]] for index in indices}
        suspects = sorted(filter(deaths.get, indices), key=deaths.__getitem__)
        for group in filter(None, ([index for index in indices if not deaths[index]], *([i] for i in suspects))):
            self.run_group(layout, group)

    def run_group(self, layout: CallLayout, group: Sequence[int]) -> None:
        """Make the images of some items of a layout; if an error does not tell of which it is, one at a time."""
        try:
            self.call_pipeline(layout, group)
        except NOT_OF_INPUTS:
            raise
        except ImvarError as error:  # of an input that can be read, but not used
            if len(group) == 1:
                self.errors[group[0]] = str(error)
            for index in group if len(group) > 1 else ():
                self.run_group(layout, [index])

    def call_pipeline(self, layout: CallLayout, group: Sequence[int]) -> None:
        """Call the pipeline with the rows of some items of a layout, the others being blank, and write the images."""
        if self.stop():
            self.journal.note_stop()
            raise StoppedError
        names = [self.items[index]["id"] for index in group]
        self.journal.note_begin(names)
        try:
            with explain_memory(self.settings.batch):
                self.make_rows(layout, self.open_items(group))
        except NOT_OF_INPUTS:  # by no fault of the items
            with suppress(OSError, BucketError):
                self.journal.note_stop()
            raise
        except ImvarError:
            self.journal.note_end(names)
            raise
        self.journal.note_end(names)

    def open_items(self, group: Sequence[int]) -> dict[int, Condition]:
        """Return the conditions of the items that can be read, and note the errors of the others."""
        conditions: dict[int, Condition] = {}
        for index in group:
            try:
                conditions[index] = open_item(self.items[index], self.pipe)
            except (OutOfMemoryError, FullDiskError):
                raise
            except (ImvarError, OSError) as error:
                if isinstance(error, BucketError) and error.status != MISUSED:  # a lost connection
                    raise
                self.errors[index] = str(error) or type(error).__name__
        return conditions

    def make_rows(self, layout: CallLayout, conditions: Mapping[int, Condition]) -> None:
        """Make and write the images of those rows of a layout whose items have conditions."""
        if not conditions:
            return
        rows = [row if row[0] in conditions else None for row in layout.rows]
        seeds = [0 if row is None else self.row_seed(*row) for row in rows]
        of_rows = [None if row is None else conditions[row[0]] for row in rows]
        made, records = call_with_rows(self.pipe, self.settings, of_rows, seeds, layout.is_of_one)
        self.write_images(rows, seeds, made, records)

    def row_seed(self, index: int, k: int) -> int:
        return self.settings.seed_of(self.items[index]["id"], k)

    def write_images(
        self, rows: Sequence[tuple[int, int] | None], seeds: Sequence[int], made: Any, records: Sequence[Any]
    ) -> None:
        """Write the images of the rows of a call."""
        flags, scores = made.nsfw_content_detected, getattr(made, "scores", None)
        for position, row in enumerate(rows):
            if row is None:
                continue
            index, k = row
            data = image_bytes(made.images[position], records[position], self.settings.save)
            entry = {"id": self.items[index]["id"], "k": k, "seed": seeds[position], "sha256": sha256(data)}
            entry["flagged"] = bool(flags[position]) if flags else None
            entry["bad_concepts"] = list(scores[position]["bad_concepts"]) if scores else None
            self.rows[row] = entry | self.writer.add(f"{self.stems[index]}-{k}.{self.settings.save}", data)
            self.sizes[row] = len(data)

    def write_results(self) -> Marker:
        """Write rows and marker."""
        made = [row for (index, _), row in sorted(self.rows.items()) if index not in self.errors]
        errors = [{"id": self.items[index]["id"], "error": text} for index, text in sorted(self.errors.items())]
        files, digest = self.writer.assemble(made)
        rows = [*made, *errors]
        marker = Marker(
            shard=self.number,
            plan=self.plan.digest(self.number),
            rows=sha256(rows_as_bytes(rows)),
            made=len(made),
            errors=len(errors),
            flagged=sum(bool(row["flagged"]) for row in made),
            bytes=sum(size for (index, _), size in self.sizes.items() if index not in self.errors),
            data=digest,
        )
        self.store.finish_shard(marker, rows, files)
        self.journal.discard()
        return marker


def call_with_rows(
    pipe: Any, settings: Settings, conditions: Sequence[Condition | None], seeds: Sequence[int], is_of_one: bool
) -> tuple[Any, list[Any]]:
    """Call a pipeline with a row for each condition, filled up with blank ones to `batch` rows.

    Returns its output and a record for each row, None without `metadata`. `is_of_one`: as `arguments_of_call` has it.
    """
    blank = settings.batch - len(conditions)
    arguments = arguments_of_call([*conditions, *[None] * blank], [*seeds, *[0] * blank], is_of_one)
    made = pipe(**arguments, **settings.call_options())
    records = made.records if settings.metadata else [None] * settings.batch
    if not is_of_one:  # which row it is depends on the other items, and no byte of its file should
        records = [record and record | {"call": record["call"] | {"row": 0, "image": 0}} for record in records]
    return made, records


@contextmanager
def explain_memory(batch: int) -> Iterator[None]:
    """Turn any out-of-memory error inside the block into an `OutOfMemoryError` that names `batch`."""
    try:
        with explain_out_of_memory():
            yield
    except OutOfMemoryError as error:
        got = first_line(error.__cause__ or error)
        hint = "use a smaller --batch, in another output folder, as it changes the bytes of images"
        raise invalid(OutOfMemoryError, "out of memory", f"enough for calls of {batch} rows", got, hint) from error


def call_layouts(settings: Settings, items: Sequence[Item]) -> Iterator[CallLayout]:
    """Yield the calls of a shard. They depend on the plan alone, and not on which items can be read."""
    pending: dict[tuple[str, bool], list[tuple[int, int]]] = {}
    for index, item in enumerate(items):
        rows = [(index, k) for k in range(settings.n)]
        if item.keys() & OF_ONE or settings.n % settings.batch == 0:
            for i in range(0, len(rows), settings.batch):
                yield CallLayout(tuple(rows[i : i + settings.batch]), is_of_one=True)
            continue
        waiting = pending.setdefault(kind_of_item(item), [])
        waiting += rows
        while len(waiting) >= settings.batch:
            yield CallLayout(tuple(waiting[: settings.batch]), is_of_one=False)
            del waiting[: settings.batch]
    for waiting in filter(None, pending.values()):
        yield CallLayout(tuple(waiting), is_of_one=False)
