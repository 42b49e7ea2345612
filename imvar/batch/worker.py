"""The loop of a worker: claim a shard, make it, go on until all are done, and check them at the end."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, invalid, short_repr
from .bucket import Location
from .environment import pipeline_of
from .finish import bad_shards, bytes_needed, is_bad, write_manifest
from .journal import Journal
from .planning import Plan, open_plan
from .shard import TRIES, StoppedError, run_shard
from .store import FULL, MORE_ROOM, FullDiskError, full_disk_text
from .workers import LoneWorker, Worker, worker_of

POLL = 0.5  # seconds between looks at shards that other workers have claimed


@dataclass(frozen=True)
class PartOf:
    """Shards i, i + of, i + 2 of, ...: the share of one of `of` processes that do not see each other's claims."""

    index: int = 0
    of: int = 1

    @classmethod
    def from_text(cls, text: str) -> PartOf:
        """Return the part that "0/4" means."""
        index, slash, of = text.partition("/")
        if not slash or not index.isdecimal() or not of.isdecimal() or not int(index) < int(of):
            raise invalid(InputError, "part", "I/N with I from 0 to N - 1, such as 0/4", short_repr(text))
        return cls(int(index), int(of))

    def divided(self, index: int, of: int) -> PartOf:
        """Return a part of this part."""
        return PartOf(self.index + self.of * index, self.of * of)

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"

    def __contains__(self, number: int) -> bool:
        return number % self.of == self.index


class Stop:
    """A request to end, as a handler of signals: `stop()` is whether there was one; `signal` is the first one."""

    def __init__(self) -> None:
        self.signal, self.at_once = 0, False

    def __call__(self) -> bool:
        return bool(self.signal)

    def handle(self, number: int, _: Any = None) -> None:
        """Note a signal; within `interrupting`, and at a second Ctrl-C, raise `KeyboardInterrupt`."""
        is_second = self.signal and number == signal.SIGINT
        self.signal = self.signal or number
        if self.at_once or is_second:
            raise KeyboardInterrupt

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """End a block that does not look for a request, such as the loading of a large model, with a `StoppedError`."""
        try:
            self.at_once = True
            if not self.signal:
                yield
        except KeyboardInterrupt:
            if not self.signal:
                raise
        finally:
            self.at_once = False
        if self.signal:
            raise StoppedError


def work(
    out: Location,
    *,
    part: PartOf = PartOf(),
    stop: Callable[[], bool] = bool,
    tries: int = TRIES,
    load: Callable[[Plan], Any] = pipeline_of,
) -> bool:
    """Work on a batch until all of its shards, or those of a part of it, are done; return whether all are.

    `load`: a function that returns the pipeline, called once there is something to do. The last worker that ends
    checks all markers and writes the manifest. Raises `StoppedError` once `stop()` returns True; a `Stop` interrupts
    `load` as well. Raises `FullDiskError` with an estimate of what is needed.
    """
    plan = open_plan(out)
    with worker_of(plan.folder.parent) as worker:
        try:
            return Loop(worker, plan, part, stop, tries, load).run()
        except OSError as error:
            cause = error.__cause__ if isinstance(error, FullDiskError) else error
            if not isinstance(cause, OSError) or cause.errno not in FULL:
                raise
            disk = worker.store.disk
            got = full_disk_text(disk, cause.errno, bytes_needed(worker.store, plan))
            raise invalid(FullDiskError, disk, "room on the disk", got, MORE_ROOM) from error


class Loop:
    """The work of one worker. `bad`: shards that are made again although they have a marker."""

    def __init__(
        self,
        worker: Worker | LoneWorker,
        plan: Plan,
        part: PartOf,
        stop: Callable[[], bool],
        tries: int,
        load: Callable[[Plan], Any],
    ):
        self.worker, self.store, self.plan, self.part = worker, worker.store, plan, part
        self.stop, self.tries, self.load = stop, tries, load
        self.pipe: Any = None
        self.bad: set[int] = set()

    def run(self) -> bool:
        """Make shards until none is missing; return whether all shards of the batch are done, of other parts too."""
        self.worker.remove_dead()
        while True:
            done = self.store.done() - self.bad
            missing = [number for number in range(len(self.plan)) if number in self.part and number not in done]
            if missing:
                made = [number for number in missing if self.make_shard(number)]
                if not made:  # others have claimed them all
                    time.sleep(POLL)
            elif len(done) < len(self.plan):
                self.bad = bad_shards(self.store, self.plan, [number for number in sorted(done) if number in self.part])
                if not self.bad:
                    return False  # the other parts are not done
            else:
                self.bad = bad_shards(self.store, self.plan, range(len(self.plan)))
                if len(plan := open_plan(self.store.folder)) > len(self.plan):  # it was extended
                    self.plan = plan
                elif not self.bad and write_manifest(self.store, self.plan):
                    self.worker.clean_up()
                    return True
                for number in self.bad:
                    if number not in self.part:
                        self.store.reopen(number)

    def make_shard(self, number: int) -> bool:
        """Make a shard unless it is done or claimed; return whether it was made."""
        if self.stop():
            raise StoppedError
        if not self.is_missing(number) or not self.worker.claim(number):
            return False
        try:
            if not self.is_missing(number):  # its owner finished it before it gave up its claim
                return False
            self.store.reopen(number)
            if self.pipe is None:
                with self.stop.interrupting() if isinstance(self.stop, Stop) else nullcontext():
                    self.pipe = self.load(self.plan)
            run_shard(self.store, self.plan, number, self.pipe, self.stop, self.tries)
            self.bad.discard(number)
            return True
        except KeyboardInterrupt:  # within a call, whose inputs are not to blame
            Journal(self.store, number).note_stop()
            raise
        finally:
            self.worker.release(number)

    def is_missing(self, number: int) -> bool:
        """Return whether a shard is not done, or done badly, which another worker may have changed by now."""
        if number in self.bad and not is_bad(self.store, self.plan, number):
            self.bad.discard(number)
        return number in self.bad or not self.store.is_done(number)
