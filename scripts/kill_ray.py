#!/usr/bin/env python3
"""Kill test of `imvar batch run --engine ray`, as scripts/kill_batch.py, on clusters of one and of two nodes.

    python scripts/kill_ray.py [--rounds 1] [--seed 0] [ROW ...]

Prints a table: for each ROW (default: all) the rounds, those whose output folder was that of one local worker that was
left alone, the seconds from the loss of a process or a node to the end, and those of all. Needs Linux.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kill_batch import ROOT, Bench, Round, RoundError, bytes_by_file, check

from tests.support.ray_cluster import ENVIRONMENT, RayCluster, actors_of, send

NODES = ("head", "other")


class RayRound(Round):
    """A round whose workers are actors, on `cluster` or on one that the driver starts."""

    cluster: RayCluster | None = None
    since = 0.0  # when something was lost
    seconds = 0.0  # from then to the end

    def __exit__(self, *error: Any) -> None:
        for process in self.processes:
            send(signal.SIGKILL, actors_of(process.pid))
        super().__exit__(*error)
        if self.cluster:
            self.cluster.__exit__(*error)

    def start_cluster(self) -> RayCluster:
        """Start a cluster of two nodes."""
        path = os.pathsep.join([str(self.bench.hooks), str(ROOT)])
        own = {"KILL_BATCH_PHOTOS": str(self.bench.photos), "KILL_BATCH_LOG": str(self.log), "PYTHONPATH": path}
        self.cluster = RayCluster(own)
        for name in NODES:
            self.cluster.add_node(name)
        return self.cluster

    def run_on_ray(self, **bad: str) -> subprocess.Popen[bytes]:
        """Start the command of the batch with two actors."""
        address = ["--address", self.cluster.address] if self.cluster else []
        return self.run(2, "--engine", "ray", *address, **bad)

    def workers(self) -> list[int]:
        nodes = self.cluster.nodes.values() if self.cluster else ()
        return [*super().workers(), *(pid for process in (*self.processes, *nodes) for pid in actors_of(process.pid))]

    def until_done(self, driver: subprocess.Popen[bytes], count: int) -> None:
        """Wait until there are two actors and a number of finished shards."""
        self.until(lambda: driver.poll() is not None or (len(self.workers()) == 2 and self.done() >= count))
        check(driver.poll() is None, f"it has ended: {self.errors.read_text()[-2000:]}")
        self.since = time.monotonic()

    def end(self, process: subprocess.Popen[bytes], status: int = 0) -> None:
        super().end(process, status)
        self.seconds = time.monotonic() - self.since if self.since else 0.0

    def check_all(self) -> None:
        """Check the output folder, and that no process is left."""
        self.until(lambda: not self.workers())
        self.check_equal()


def left_alone(r: RayRound) -> None:
    """Two nodes, and nothing happens to them."""
    r.start_cluster()
    r.end(r.run_on_ray())
    r.check_all()


def worker_killed(r: RayRound) -> None:
    """SIGKILL of one of two actors."""
    driver = r.run_on_ray()
    r.until_done(driver, r.rng.randrange(r.shards - 1))
    r.kill(r.rng.choice(r.workers()))
    r.lost = 1
    r.end(driver)
    r.check_all()


def driver_killed(r: RayRound) -> None:
    """SIGKILL of the driver on a cluster of two nodes, and the same command at once."""
    r.start_cluster()
    driver = r.run_on_ray()
    r.until_done(driver, r.rng.randrange(r.shards - 1))
    r.kill(driver.pid)
    r.lost = 2
    r.end(r.run_on_ray())
    r.check_all()


def node_lost(r: RayRound) -> None:
    """SIGKILL of all processes of one of two nodes, which does not return."""
    lose_node(r, signal.SIGKILL)


def node_silent(r: RayRound) -> None:
    """SIGSTOP of all processes of one of two nodes: its connections stay, as when a network is cut."""
    lose_node(r, signal.SIGSTOP)


def lose_node(r: RayRound, number: int) -> None:
    cluster = r.start_cluster()
    driver = r.run_on_ray()
    r.until_done(driver, 1)
    cluster.signal_node(NODES[1], number)
    r.lost = 1
    r.end(driver)
    cluster.signal_node(NODES[1], signal.SIGKILL)
    r.check_all()


def cluster_lost(r: RayRound) -> None:
    """SIGKILL of all processes of both nodes; the driver ends by itself, and one local worker goes on."""
    cluster = r.start_cluster()
    driver = r.run_on_ray()
    r.until_done(driver, 1)
    for name in NODES:
        cluster.signal_node(name, signal.SIGKILL)
    r.until(lambda: driver.poll() is not None)
    check(driver.poll() != 0, "the driver ended as if all was done")
    r.lost = 2
    r.errors.write_text("")  # what Ray says of its end
    r.end(r.run(1))
    r.check_all()


def both_engines(r: RayRound) -> None:
    """A driver on a cluster, one on Ray of its own, and one of local workers at once on one output folder."""
    r.start_cluster()
    first = r.run_on_ray()
    second = r.run(1, "--engine", "ray")
    third = r.run(1)
    for process in (first, second, third):
        r.end(process)
    r.check_all()


def poison(r: RayRound) -> None:
    """A photo that kills every process that opens it."""
    name = r.rng.choice([name for name in r.bench.names if name != "broken.png"])
    r.end(r.run_on_ray(poison=name))
    deaths = sum(line.split()[1] == name for line in r.log.read_text().splitlines())
    check(1 <= deaths <= 4, f"{deaths} deaths")
    errors = {row["id"]: row["error"] for row in r.rows("errors.jsonl")}
    check(errors.keys() == {name, "broken.png"} and "processes died" in errors[name], errors)
    expected = bytes_by_file(r.bench.expected(r.layout))
    check(bytes_by_file(r.out) == {key: data for key, data in expected.items() if key[0] != name}, "not equal")
    check(not list(r.out.glob("[wcj]*s")), "left over: workers, claims or journal")


def terminated(r: RayRound) -> None:
    """SIGTERM of the driver, exit status 143 with nothing left of its processes; then a local worker."""
    driver = r.run_on_ray()
    r.until_done(driver, r.rng.randrange(r.shards - 1))
    driver.terminate()
    r.lost = 2
    r.end(driver, 143)
    check(not r.workers(), "workers have not left")
    left = [*r.out.glob("claims*"), *r.out.glob("workers*"), *r.out.rglob("*.tmp")]
    check(not left, f"left: {left}")
    r.end(r.run(1))
    r.check_all()


ROWS = {
    "left alone": left_alone,
    "worker killed": worker_killed,
    "driver killed": driver_killed,
    "node lost": node_lost,
    "node silent": node_silent,
    "cluster lost": cluster_lost,
    "both engines": both_engines,
    "poison": poison,
    "terminated": terminated,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the random moments")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    args = parser.parse_args(arguments)
    if unknown := set(args.rows) - ROWS.keys():
        parser.error(f"no such row: {min(unknown)}")
    os.environ.update(ENVIRONMENT)
    folder, failed = Path(tempfile.mkdtemp(prefix="kill-ray-")), 0
    print("| row | rounds | equal | seconds after the loss | seconds |", "|---" * 5 + "|", sep="\n")
    try:
        bench = Bench(folder, 9, 1)
        bench.expected("files")
        for row in args.rows or ROWS:
            start, after, bad = time.monotonic(), [], 0
            for index in range(args.rounds):
                with RayRound(bench, "files", random.Random(f"{args.seed} {row} {index}")) as r:
                    try:
                        ROWS[row](r)
                    except (RoundError, AssertionError, subprocess.TimeoutExpired) as error:
                        print(error, file=sys.stderr, flush=True)
                        bad += 1
                    after.append(f"{r.seconds:.0f}")
            failed += bad
            cells = (row, args.rounds, args.rounds - bad, ", ".join(after), f"{time.monotonic() - start:.0f}")
            print("|", " | ".join(map(str, cells)), "|", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
