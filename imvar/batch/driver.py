"""The driver of a batch on one machine: starts the workers, starts dead ones again, and ends with a report."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import check_int
from ..errors import InputError, invalid, short_repr
from .bucket import BucketPath, Location
from .exits import DONE, EXPECTED, GIVEN_UP, MEANINGS, BatchError
from .finish import Report, batch_report
from .inputs import Item
from .journal import path_of
from .planning import Plan, make_plan, open_plan
from .shard import TRIES
from .store import Store, json_lines, listed
from .worker import PartOf
from .workers import worker_of

ENGINES = ("local", "ray")
POLL = 0.2  # seconds
PAUSE = 1.0  # seconds before a dead worker is started again
MORE_STARTS = 3  # than tries, without progress, after which the driver gives up
BAD_INPUTS = 3  # in a row, each with its tries, after which it gives up as well


def run(
    inputs: str | Path | Iterable[str | Path],
    out: str | Location,
    checkpoint: str | Path | None = None,
    *,
    shared: Item | None = None,
    jobs: int | None = None,
    gpus: str | Sequence[int] | None = None,
    part: str | None = None,
    tries: int = TRIES,
    engine: str = "local",
    address: str | None = None,
    gpus_per_worker: float = 1.0,
    progress: Callable[[Report], None] | None = None,
    **settings: Any,
) -> Report:
    """Make the variations of many images in `out`, and return a report; what exists of the same batch stays.

    Args:
        inputs, out, shared, settings: see `make_plan`; `checkpoint` is one of the settings.
        jobs: the number of workers, processes; by default one, or one for each of `gpus`.
        gpus: the numbers of the GPUs that the workers use in turn, or "all".
        part: "I/N" to make only shards I, I + N, I + 2 N, ...
        tries: how often workers may die at an input alone before that becomes an error.
        engine: "local" for processes of this machine, "ray" for actors on a Ray cluster, by default one for each share
            of a GPU or, without GPUs, for each node.
        address: of the Ray cluster, "auto" or "HOST:PORT"; by default RAY_ADDRESS, or a cluster of this machine alone
            that is started and ended.
        gpus_per_worker: the share of a GPU that an actor has, such as 0.5.
        progress: a function that is called with the report whenever that has changed.

    Raises `InputError` as `make_plan`, and `BatchError` where workers cannot work.
    """
    check_engine(engine, address, gpus, gpus_per_worker)
    options = settings if checkpoint is None else {"checkpoint": checkpoint, **settings}
    plan = make_plan(inputs, out, shared=shared, **options)
    return drive(
        plan.folder.parent,
        jobs=jobs,
        gpus=gpus,
        part=part,
        tries=tries,
        engine=engine,
        address=address,
        gpus_per_worker=gpus_per_worker,
        progress=progress,
    )


def drive(
    out: str | Location,
    *,
    jobs: int | None = None,
    gpus: str | Sequence[int] | None = None,
    part: str | None = None,
    tries: int = TRIES,
    engine: str = "local",
    address: str | None = None,
    gpus_per_worker: float = 1.0,
    progress: Callable[[Report], None] | None = None,
) -> Report:
    """Work on the existing plan of `out` with worker processes, as `run` does."""
    check_engine(engine, address, gpus, gpus_per_worker)
    plan, part_of = open_plan(out), PartOf.from_text(part) if part else PartOf()
    if engine == "ray":
        from .on_ray import drive_on_ray

        drive_on_ray(plan, address, jobs, gpus_per_worker, part_of, tries, progress)
    else:
        Driver(plan, jobs, gpu_list(gpus), part_of, tries, progress).run()
    return batch_report(Store(plan.folder.parent), plan)


def check_engine(
    engine: str, address: str | None, gpus: str | Sequence[int] | None, gpus_per_worker: float = 1.0
) -> None:
    """Raise `InputError` for options of one engine with the other, and without the package of the engine."""
    if engine not in ENGINES:
        raise invalid(InputError, "engine", " or ".join(ENGINES), short_repr(engine))
    if not 0 < gpus_per_worker <= 1:
        raise invalid(
            InputError, "gpus_per_worker", "a share of a GPU, above 0 and up to 1", short_repr(gpus_per_worker)
        )
    if engine == "ray":
        from .on_ray import import_ray

        if gpus is not None:
            hint = "Ray places the workers; see gpus_per_worker"
            raise invalid(InputError, "gpus", "none with the engine ray", short_repr(gpus), hint)
        import_ray()
    elif address is not None:
        raise invalid(InputError, "address", "none with the engine local", short_repr(address), "use the engine ray")
    elif gpus_per_worker != 1:
        raise invalid(
            InputError, "gpus_per_worker", "1 with the engine local", short_repr(gpus_per_worker), "use the engine ray"
        )


def gpu_list(gpus: str | Sequence[int] | None) -> list[str]:
    """Return the GPUs as CUDA_VISIBLE_DEVICES names them; "all" are those that it names now, or all there are."""
    if gpus is None:
        return []
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if gpus == "all":
        import torch

        found = visible or [str(k) for k in range(torch.cuda.device_count())]
    else:
        found = gpus.split(",") if isinstance(gpus, str) else [str(gpu) for gpu in gpus]
        found = [visible[int(gpu)] if visible and gpu.isdecimal() and int(gpu) < len(visible) else gpu for gpu in found]
    if not found or not all(found):
        raise invalid(InputError, "gpus", "numbers of GPUs such as 0,1, or all where there are some", short_repr(gpus))
    return found


class Driver:
    """The worker processes of one `imvar batch run`."""

    def __init__(
        self,
        plan: Plan,
        jobs: int | None,
        gpus: Sequence[str],
        part: PartOf,
        tries: int,
        progress: Callable[[Report], None] | None,
    ):
        self.plan, self.gpus, self.part, self.tries, self.progress = plan, gpus, part, tries, progress
        self.jobs = len(gpus) or 1 if jobs is None else check_int("jobs", jobs)
        self.store = Store(plan.folder.parent)
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        self.progress_at_death = dict.fromkeys(range(self.jobs), self.signs_of_progress())
        self.starts_in_vain = dict.fromkeys(range(self.jobs), 0)
        self.next_look, self.done = 0.0, -1

    def run(self) -> None:
        """Return when all workers have ended well. Raises `BatchError` when one ends otherwise, for good."""
        running = set(range(self.jobs))
        try:
            for slot in running:
                self.start_worker(slot)
            while running:
                time.sleep(POLL)
                self.show()
                for slot in sorted(running):
                    status = self.poll_worker(slot)
                    if status == DONE:
                        running.discard(slot)
                    elif status is not None:
                        self.after_death(slot, status)
            self.show(at_once=True)
        finally:
            self.end_workers()

    def start_worker(self, slot: int) -> None:
        """Start a worker. It ends when its standard input does, so also when this process is killed."""
        command = [sys.executable, "-m", "imvar", "batch", "join", str(self.store.folder), "--until-stdin-ends"]
        command += ["--tries", str(self.tries), "--part", str(self.part_of_worker(slot))]
        gpu = {"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]} if self.gpus else {}
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, **gpu, "PYTHONPATH": path}
        self.workers[slot] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, start_new_session=True
        )

    def part_of_worker(self, slot: int) -> PartOf:
        """Return the shards of a worker, which in an object store sees no claims."""
        return self.part.divided(slot, self.jobs) if isinstance(self.store.folder, BucketPath) else self.part

    def poll_worker(self, slot: int) -> int | None:
        """Return the exit status of a worker, None while it works."""
        return self.workers[slot].poll()

    def reason_of_end(self, slot: int, status: int) -> str:
        """Return why a worker has ended, for a message."""
        return MEANINGS.get(status, f"status {status}")

    def after_death(self, slot: int, status: int) -> None:
        """Start a dead worker again, unless it said why it ended, or starts are in vain."""
        if status in EXPECTED:
            raise invalid(BatchError, "worker", "an end of its work", self.reason_of_end(slot, status), status=status)
        signs, before = self.signs_of_progress(), self.progress_at_death[slot]
        has_progressed = (signs.done, signs.ended) != (before.done, before.ended)
        if has_progressed:
            self.progress_at_death[slot], self.starts_in_vain[slot] = signs, 0
        self.starts_in_vain[slot] += 1
        has_begun = signs.begun > before.begun and not has_progressed
        limit = BAD_INPUTS * (self.tries + 1) if has_begun else self.tries + MORE_STARTS
        if self.starts_in_vain[slot] >= limit:
            last = self.reason_of_end(slot, status)
            got = f"{self.starts_in_vain[slot]} that died one after the other, the last with {last}"
            hint = "imvar batch status says what is done; the same command goes on"
            raise invalid(BatchError, "workers", "one that makes a shard", got, hint, status=GIVEN_UP)
        time.sleep(PAUSE)
        self.start_worker(slot)

    def signs_of_progress(self) -> Signs:
        """Return how far the workers are."""
        names = [name.partition(".")[0] for name in listed(self.store.folder / "journal")]
        paths = [path_of(self.store.folder, int(name)) for name in names if name.isdecimal()]
        lines = [line for path in paths for line in json_lines(path)]
        begun, ended = (sum(event in line for line in lines) for event in ("begin", "end"))
        return Signs(len(self.store.done()), begun, ended)

    def show(self, at_once: bool = False) -> None:
        """Report progress, if there is any, and look for it in at most a twentieth of the time."""
        start = time.monotonic()
        if self.progress is None or (start < self.next_look and not at_once):
            return
        if (done := len(self.store.done())) != self.done:
            self.done = done
            self.progress(batch_report(self.store, self.plan))
        self.next_look = time.monotonic() + max(1.0, 20 * (time.monotonic() - start))

    def end_workers(self) -> None:
        """Let the workers end, after the calls that they are in; at a second signal at once."""
        for worker in self.workers.values():
            if worker.stdin:
                worker.stdin.close()
        try:
            for worker in self.workers.values():
                worker.wait()
        finally:
            for worker in self.workers.values():
                worker.kill()  # does nothing to those that have ended
            statuses = [worker.wait() for worker in self.workers.values()]
            if any(statuses):
                with suppress(OSError), worker_of(self.store.folder) as remover:
                    remover.remove_dead()


@dataclass(frozen=True)
class Signs:
    """Shards that are done, and calls within the others that have begun and ended."""

    done: int
    begun: int
    ended: int
