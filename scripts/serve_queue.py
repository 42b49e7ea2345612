"""The queue of `scripts/serve.py`: requests of equal settings become the rows of one call of the pipeline.

It lives in the event loop of the server, without locks. One thread calls the pipeline, and nothing else.
"""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from starlette.exceptions import HTTPException

from imvar.batch.conditions import Condition
from imvar.batch.settings import Settings
from imvar.batch.shard import call_with_rows
from imvar.batch.write import image_bytes
from imvar.errors import ImvarError, OutOfMemoryError
from imvar.oom import explain_out_of_memory

MAX_WAITING_PIXELS = 2**28  # of the images in the queue, 3 bytes each
STOPPING = "server: expected a running one, got one that stops"
OOM_HINT = "use a smaller size, or a server with a smaller --batch"


@dataclass(eq=False)
class Job:
    """A request: an image, its settings and, once they are made, the files of its variations."""

    stem: str
    photo: Image.Image
    settings: Settings
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    arrived: float = field(default_factory=time.monotonic)
    begun: int = 0  # variations that are in calls
    files: dict[int, bytes] = field(default_factory=dict)
    flags: dict[int, bool | None] = field(default_factory=dict)
    error: Exception | None = None

    @property
    def is_of_one(self) -> bool:
        """Whether its calls have no other rows, as those of `imvar batch` then."""
        return self.settings.n % self.settings.batch == 0

    @property
    def seeds(self) -> list[int]:
        return [self.settings.seed_of("", k) for k in range(self.settings.n)]

    def shares_calls(self, other: Job) -> bool:
        """Return whether its variations and those of another job may be rows of one call."""
        options = self.settings.call_options()
        return self is other or (not (self.is_of_one or other.is_of_one) and options == other.settings.call_options())


Rows = list[tuple[Job, int]]
"""The rows of a call: a job and the number of a variation each."""


class Metrics:
    """The metrics of a server, for Prometheus."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("imvar_requests", "Requests by HTTP status", ["status"], registry=registry)
        self.waiting = Gauge("imvar_queue_length", "Requests that have not begun", registry=registry)
        shares = [0.25, 0.5, 0.75, 1]
        self.fill = Histogram(
            "imvar_batch_fill", "Rows of a call that are not blank", buckets=shares, registry=registry
        )
        self.seconds = Histogram("imvar_call_seconds", "Seconds for a call of the pipeline", registry=registry)


class Queue:
    """The waiting jobs, in the event loop, and the thread that calls the pipeline for them."""

    def __init__(self, pipe: Any, worker: ThreadPoolExecutor, batch: int, limit: int, wait: float):
        self.pipe, self.worker, self.batch, self.limit, self.wait = pipe, worker, batch, limit, wait
        self.jobs: list[Job] = []  # some of whose variations are in no call
        self.added = asyncio.Event()
        self.metrics = Metrics()
        self.metrics.waiting.set_function(lambda: len(self.waiting()))
        self.last_seconds = 1.0  # for a call
        self.is_stopping = False

    def waiting(self) -> list[Job]:
        return [job for job in self.jobs if not job.begun]

    def add(self, job: Job) -> None:
        """Add a job, if there is room."""
        self.check_room(job)
        self.jobs.append(job)
        self.added.set()

    def check_room(self, *more: Job) -> None:
        """Raise `HTTPException` if the queue is full, or the server stops."""
        if self.is_stopping:
            raise HTTPException(503, STOPPING)
        pixels, waiting = sum(math.prod(job.photo.size) for job in (*self.jobs, *more)), len(self.waiting())
        if waiting >= self.limit or (self.jobs and pixels > MAX_WAITING_PIXELS):
            calls = sum(job.settings.n - job.begun for job in self.jobs) / self.batch
            seconds = math.ceil(max(1, calls * self.last_seconds))
            text = f"queue: expected room, got {waiting} requests that wait; try again in {seconds} s"
            raise HTTPException(429, text, {"Retry-After": str(seconds)})

    def remove(self, job: Job) -> None:
        """Make no more variations of a job."""
        if job in self.jobs:
            self.jobs.remove(job)

    def stop(self) -> None:
        """Refuse jobs from now on, and those that have not begun."""
        self.is_stopping = True
        for job in self.waiting():
            self.remove(job)
            if not job.done.done():
                job.done.set_exception(HTTPException(503, STOPPING))

    async def run(self) -> None:
        """Make the variations of jobs, call by call, for ever."""
        while True:
            await self.added.wait()
            rows = await self.next_rows()
            if not rows:
                continue
            await asyncio.get_running_loop().run_in_executor(self.worker, self.make, rows)
            for job in dict.fromkeys(job for job, _ in rows):
                if job.error is not None:
                    self.remove(job)
                if job.done.done():  # its client has gone
                    continue
                if job.error is not None:
                    job.done.set_exception(job.error)
                elif len(job.files) == job.settings.n:
                    job.done.set_result(None)

    async def next_rows(self) -> Rows:
        """Return the rows of the next call, which is that of the oldest job, after a short wait if it is not full."""
        end = self.jobs[0].arrived + self.wait if self.jobs else 0.0
        while len(rows := self.rows_of_oldest()) < self.batch and (left := end - time.monotonic()) > 0:
            self.added.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.added.wait(), left)
        for job, _ in rows:
            job.begun += 1
            if job.begun == job.settings.n:
                self.jobs.remove(job)
        if self.jobs:
            self.added.set()
        else:
            self.added.clear()
        return rows

    def rows_of_oldest(self) -> Rows:
        """Return the rows that the next call would have."""
        jobs = [job for job in self.jobs if job.shares_calls(self.jobs[0])]
        return [(job, k) for job in jobs for k in range(job.begun, job.settings.n)][: self.batch]

    def make(self, rows: Rows) -> None:
        """Make variations; if an error does not tell of which job it is, each job in a call of its own."""
        jobs = list(dict.fromkeys(job for job, _ in rows))
        try:
            self.call_pipeline(rows)
        except Exception as error:
            if isinstance(error, ImvarError) and not isinstance(error, OutOfMemoryError) and len(jobs) > 1:
                for job in jobs:
                    self.make([row for row in rows if row[0] is job])
                return
            for job in jobs:
                job.error = error

    def call_pipeline(self, rows: Rows) -> None:
        start, (first, _) = time.perf_counter(), rows[0]
        conditions, seeds = [Condition(job.photo) for job, _ in rows], [job.seeds[k] for job, k in rows]
        with explain_out_of_memory(OOM_HINT):
            made, records = call_with_rows(self.pipe, first.settings, conditions, seeds, first.is_of_one)
        flags = made.nsfw_content_detected or [None] * len(rows)
        for (job, k), image, record, flag in zip(rows, made.images, records, flags, strict=False):  # then blank ones
            job.files[k], job.flags[k] = image_bytes(image, record, "png"), flag
        self.last_seconds = time.perf_counter() - start
        self.metrics.seconds.observe(self.last_seconds)
        self.metrics.fill.observe(len(rows) / self.batch)
