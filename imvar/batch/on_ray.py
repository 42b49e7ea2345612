"""The Ray engine: the workers of a batch are actors, each with a GPU or a share of one, on any node of a cluster.

Ray places processes and nothing more. They claim shards as the workers of `imvar batch join` do, which may help. Actors
are not restarted by Ray: of a node that is lost for good, that would wait for ever. A new one is placed where there is
room, and the driver gives up the claims of a dead one at once.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, OutOfMemoryError, first_line, invalid, warn_user
from .bucket import BucketPath, location
from .driver import Driver
from .environment import pipeline_of, read_environment
from .exits import DONE, FULL_DISK, MISUSED, OUT_OF_MEMORY, TERMINATED
from .finish import Report
from .planning import Plan
from .processes import process_name
from .shard import StoppedError
from .store import FullDiskError, listed
from .worker import PartOf, work
from .workers import Worker, remove_any

DEAD = -1  # the status of an actor whose process is lost
OBJECTS = 10**8  # bytes of Ray's memory for objects, of which there are none
PATIENCE = 30.0  # seconds without any actor before a warning
CLUSTER = "that of a running Ray cluster with this version of Ray"


class WorkingActor:
    """The actor: a worker, which is asked to end by a second thread."""

    def __init__(self) -> None:
        self.end, self.is_loading = threading.Event(), False

    def identify(self) -> str:
        """Return what the name of this worker begins with."""
        return process_name().rpartition("-")[0]

    def make_shards(self, out: str, part: str, tries: int) -> tuple[int, str]:
        """Work until all shards are done; return an exit status of `imvar batch`, with the reason."""
        try:
            work(
                location("out", out),
                part=PartOf.from_text(part),
                stop=self.end.is_set,
                tries=tries,
                load=self.load_pipe,
            )
        except StoppedError:
            return TERMINATED, "a request to end"
        except OutOfMemoryError as error:
            return OUT_OF_MEMORY, str(error)
        except FullDiskError as error:
            return FULL_DISK, str(error)
        except InputError as error:
            return MISUSED, str(error)
        return DONE, ""

    def load_pipe(self, plan: Plan) -> Any:
        self.is_loading = True
        pipe = pipeline_of(plan)
        self.is_loading = False
        return pipe

    def request_end(self) -> None:
        """Ask for the end after the present call; while the pipeline is loaded, end at once."""
        self.end.set()
        if self.is_loading:
            os._exit(TERMINATED)


@dataclass
class Placed:
    """An actor as the driver sees it: `name` once it has a place, `reason` of its end."""

    actor: Any
    future: Any
    name: str = ""
    reason: str = ""


def drive_on_ray(
    plan: Plan,
    address: str | None,
    jobs: int | None,
    gpus_per_worker: float,
    part: PartOf,
    tries: int,
    progress: Callable[[Report], None] | None,
) -> None:
    """Make the shards of a plan on a Ray cluster; see `drive`. Raises `BatchError` as the driver of one machine."""
    ray = import_ray()
    with connected(ray, address, jobs):
        RayDriver(ray, plan, jobs, gpus_per_worker, part, tries, progress).run()


def import_ray() -> Any:
    """Return the module ray."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    try:
        import ray
    except ImportError as error:
        raise invalid(InputError, "engine", "the package ray", "none", "pip install 'imvar[batch]'") from error
    return ray


@contextmanager
def connected(ray: Any, address: str | None, jobs: int | None) -> Iterator[None]:
    """Connect to a cluster within the block, unless this process is connected; without an address start one."""
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:  # Ray itself tries for minutes
        try:
            socket.create_connection((host, int(port)), PATIENCE).close()
        except (OSError, OverflowError) as error:
            raise invalid(InputError, "address", CLUSTER, f"{address} ({error})") from error
    if address == "local":
        cpus = max(jobs or 1, os.cpu_count() or 1)
        options |= {"include_dashboard": False, "object_store_memory": OBJECTS, "num_cpus": cpus}
    try:
        with kept_sigterm():
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        ray.shutdown()
        raise invalid(InputError, "address", CLUSTER, f"{address} ({first_line(error)})") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def kept_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM, which `ray.init` replaces by one that exits with another status."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


class RayDriver(Driver):
    """The actors of one `imvar batch run`, which are to it what processes are to the driver of one machine."""

    def __init__(
        self,
        ray: Any,
        plan: Plan,
        jobs: int | None,
        gpus_per_worker: float,
        part: PartOf,
        tries: int,
        progress: Callable[[Report], None] | None,
    ):
        self.ray = ray
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        recorded = read_environment(plan)
        device = recorded["machine"]["device"] if recorded else plan.settings.device
        needs = {"num_cpus": 1.0}
        if device.startswith("cuda") or (gpus and device == "auto"):
            needs["num_gpus"] = gpus_per_worker
            places = gpus * int(1 / gpus_per_worker)
        else:
            places = sum(node.get("CPU", 0) >= 1 for node in nodes)
        self.needs = ", ".join(f"{name}={number:g}" for name, number in needs.items())
        options = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": 2, "scheduling_strategy": "SPREAD"}
        self.actor_class = ray.remote(**needs, **options)(WorkingActor)
        self.actors: dict[int, Placed] = {}
        self.is_in_bucket = isinstance(plan.folder, BucketPath)
        self.is_finished = self.has_had_room = False
        self.warn_at = time.monotonic() + PATIENCE
        super().__init__(plan, jobs or places or 1, [], part, tries, progress)

    def start_worker(self, slot: int) -> None:
        """Ask for an actor, which has a place once there is room."""
        actor = self.actor_class.remote()
        self.actors[slot] = Placed(actor, actor.identify.remote())

    def poll_worker(self, slot: int) -> int | None:
        """Return the exit status of an actor: None while it works or waits for a place, unless all is done by now."""
        placed = self.actors[slot]
        if not self.ray.wait([placed.future], timeout=0)[0]:
            self.warn_of_no_room()
            is_needless = self.is_finished and not placed.name and not self.is_in_bucket
            return DONE if is_needless else None
        try:
            result = self.ray.get(placed.future)
        except self.ray.exceptions.RayError as error:
            placed.reason = f"the error {' '.join(str(error).split())}"
            return DEAD
        if not placed.name:
            placed.name, self.has_had_room = result, True
            part = str(self.part_of_worker(slot))
            placed.future = placed.actor.make_shards.remote(str(self.store.folder), part, self.tries)
            return None
        status, placed.reason = result
        if status == DONE:
            self.is_finished = True
            self.ray.kill(placed.actor)  # its place is free for one that waits
        return status

    def after_death(self, slot: int, status: int) -> None:
        self.ray.kill(self.actors[slot].actor)  # does nothing to a dead one
        self.remove_lost(self.actors[slot].name)
        super().after_death(slot, status)

    def reason_of_end(self, slot: int, status: int) -> str:
        return self.actors[slot].reason

    def warn_of_no_room(self) -> None:
        """Warn once if no actor has had a place after a while."""
        if not self.has_had_room and time.monotonic() > self.warn_at:
            self.has_had_room = True
            warn_user(f"the Ray cluster has had no room for a worker ({self.needs}) for {PATIENCE:g} s")

    def end_workers(self) -> None:
        """Let the actors end, after the calls that they are in; at a second signal at once."""
        placed = [one for one in self.actors.values() if one.name]  # those that have ended too
        try:
            for one in placed:
                one.actor.request_end.remote()
            self.ray.wait([one.future for one in placed], num_returns=len(placed)) if placed else None
        finally:
            for one in self.actors.values():
                self.ray.kill(one.actor)
            if not self.is_finished:
                self.remove_lost(*(one.name for one in placed))

    def remove_lost(self, *names: str) -> None:
        """Remove the claims and the folders of actors that are lost, which other machines cannot know at once."""
        if self.is_in_bucket:  # where there are none
            return
        with suppress(OSError), Worker(Path(self.store.folder)) as remover:
            for name in listed(remover.claims):
                owner = remover.owner(name) or ""
                if owner.rpartition("-")[0] in names:
                    remover.remove_claim(name, owner)
            for name in listed(remover.folder.parent):
                if name.rpartition("-")[0] in names:
                    remove_any(remover.folder.parent / name)
