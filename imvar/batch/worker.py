"""The loop of a worker: claim a shard, make it, go on until all are done, and check them at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, invalid, short_repr
from .environment import pipeline_of
from .finish import bad_shards, write_manifest
from .planning import Plan, open_plan
from .shard import TRIES, StoppedError, run_shard
from .workers import Worker

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

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"

    def __contains__(self, number: int) -> bool:
        return number % self.of == self.index


def work(
    out: Path,
    *,
    part: PartOf = PartOf(),
    stop: Callable[[], bool] = bool,
    tries: int = TRIES,
    load: Callable[[Plan], Any] = pipeline_of,
) -> bool:
    """Work on a batch until all of its shards, or those of a part of it, are done; return whether all are.

    `load`: a function that returns the pipeline, called once there is something to do. The last worker that ends
    checks all markers and writes the manifest. Raises `StoppedError` once `stop()` returns True.
    """
    plan, pipe = open_plan(out), None
    with Worker(plan.folder.parent) as worker:
        while True:
            done = worker.store.done()
            missing = [number for number in range(len(plan)) if number in part and number not in done]
            if not missing:
                if len(done) < len(plan):
                    return False  # the other parts are not done
                bad = bad_shards(worker.store, plan)
                if not bad:
                    write_manifest(worker.store, plan)
                    worker.remove_dead()
                    return True
                for number in bad:
                    worker.store.reopen(number)
                continue
            has_worked = False
            for number in missing:
                if stop():
                    raise StoppedError
                if worker.store.is_done(number) or not worker.claim(number):
                    continue
                try:
                    if not worker.store.is_done(number):
                        pipe = pipe or load(plan)
                        run_shard(worker.store, plan, number, pipe, stop, tries)
                        has_worked = True
                finally:
                    worker.release(number)
            if not has_worked:  # others have claimed all that is missing
                time.sleep(POLL)
