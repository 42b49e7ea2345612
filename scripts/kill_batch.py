#!/usr/bin/env python3
"""Kill test of `imvar batch`: kill its processes at random moments, spoil its files, and compare with a quiet run.

    python scripts/kill_batch.py [--rounds 5] [--seed 0] [--photos 6] [--format files|tar|parquet] [--keep] [ROW ...]

Each round is a batch of drawings by imvar-emoji, of which one is broken, with 3 variations each in shards of 2. At its
end the whole output folder has to be that of one worker that was left alone: the same files with the same bytes, every
variation once in manifest.jsonl, and nothing else. Prints a table: for each ROW (default: all) and layout of the output
the rounds, those that ended so, the processes lost, and the shards made again, of which each lost worker may cause one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from imvar import bundled_examples
from imvar.batch.processes import machine, process_name
from tests.support.crashes import mount, run_in_child

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 120  # seconds for one command
HOOK = """
import os, signal, sys, time

def hook(event, args):
    path = args[0] if event == "open" else None
    if isinstance(path, (str, os.PathLike)):
        folder, name = os.path.split(os.fspath(path))
        if folder == os.environ["KILL_BATCH_PHOTOS"]:
            os.write(log, f"{os.getpid()} {name}\\n".encode())
        if name == os.environ.get("KILL_BATCH_POISON"):
            os.kill(os.getpid(), signal.SIGKILL)
        if name == os.environ.get("KILL_BATCH_HANG"):
            os.write(log, f"{os.getpid()} hang\\n".encode())
            time.sleep(1000)

if any(word == "join" or "default_worker" in word for word in sys.orig_argv):  # the latter of Ray
    log = os.open(os.environ["KILL_BATCH_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    sys.addaudithook(hook)
"""
"""A sitecustomize.py, which Python imports at its start: in workers it logs which photo is opened, and for the file
that the environment names it kills the process, as a decoder that crashes does, or hangs, as a network disk does."""


class RoundError(AssertionError):
    """A round did not end as it should."""


def check(condition: Any, text: Any) -> None:
    if not condition:
        raise RoundError(text)


def accept_interrupts() -> None:
    """Undo what a shell does for jobs in the background, as this may be one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return the bytes of each file in a folder, and None for each folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


class Bench:
    """The photos of all rounds, and the output folders of quiet runs."""

    def __init__(self, folder: Path, photos: int = 6, shard: int = 2):
        self.folder, self.shard = folder, shard
        self.photos, self.hooks = folder / "photos", folder / "hooks"
        self.photos.mkdir()
        self.hooks.mkdir()
        (self.hooks / "sitecustomize.py").write_text(HOOK)
        for path in list(bundled_examples("imvar-emoji").values())[: photos - 1]:
            shutil.copy(path, self.photos)
        (self.photos / "broken.png").write_text("no image")
        self.names = sorted(path.name for path in self.photos.iterdir())
        self.quiet: dict[str, Path] = {}
        self.rounds = 0

    def expected(self, layout: str) -> Path:
        """Return the output folder of a run that was left alone."""
        if layout not in self.quiet:
            with Round(self, layout, random.Random(0)) as quiet:
                quiet.end(quiet.run())
                self.quiet[layout] = quiet.out
        return self.quiet[layout]


class Round:
    """One batch, and the processes that work on it.

    `lost`: the workers that were killed or stopped; `spoiled`: shards that have to be made a second time anyway.
    """

    def __init__(self, bench: Bench, layout: str, rng: random.Random, folder: Path | None = None):
        bench.rounds += 1
        self.bench, self.layout, self.rng = bench, layout, rng
        self.folder = (folder or bench.folder) / f"round-{bench.rounds}"
        self.out, self.log, self.errors = self.folder / "out", self.folder / "opened", self.folder / "stderr"
        self.folder.mkdir()
        self.shards = -(-len(bench.names) // bench.shard)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.lost = self.spoiled = 0

    def __enter__(self) -> Round:
        return self

    def __exit__(self, *error: Any) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for worker in self.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)

    # Processes

    def start(self, *arguments: str, poison: str = "", hang: str = "") -> subprocess.Popen[bytes]:
        """Start an action of `imvar batch`, with the name of a file that kills its workers, or lets them hang."""
        path = os.pathsep.join(filter(None, [str(self.bench.hooks), str(ROOT), os.environ.get("PYTHONPATH")]))
        own = {"KILL_BATCH_PHOTOS": str(self.bench.photos), "KILL_BATCH_LOG": str(self.log), "OMP_NUM_THREADS": "1"}
        own |= {"KILL_BATCH_POISON": poison, "KILL_BATCH_HANG": hang}
        with self.errors.open("ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "imvar", "batch", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={**os.environ, "PYTHONPATH": path, **own},
                start_new_session=True,
                preexec_fn=accept_interrupts,
            )
        self.processes.append(process)
        return process

    def run(self, jobs: int = 1, *more: str, **bad: str) -> subprocess.Popen[bytes]:
        """Start the command of the batch."""
        settings = f"--checkpoint imvar-emoji -n 3 --steps 2 --batch 2 --shard {self.bench.shard} --max-errors 1"
        options = [*settings.split(), "--format", self.layout, "-j", str(jobs), *more]
        return self.start("run", str(self.bench.photos), "-o", str(self.out), *options, **bad)

    def end(self, process: subprocess.Popen[bytes], status: int = 0) -> None:
        """Wait for the end of a process, which has to have this status, and not an error of Python's."""
        ended = process.wait(timeout=TIMEOUT)
        text = self.errors.read_text()
        check(ended == status, f"exit status {ended} instead of {status}: {text[-2000:]}")
        check("Traceback" not in text, text[-2000:])

    def workers(self) -> list[int]:
        """Return the process numbers of all workers on this batch."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if b"join" in words and os.fsencode(self.out) in words:
                    found.append(int(folder.name))
        return found

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait for a condition."""
        end = time.monotonic() + TIMEOUT
        while not condition():
            check(time.monotonic() < end, f"no end in {TIMEOUT} s: {self.errors.read_text()[-2000:]}")
            time.sleep(0.01)

    def done(self) -> int:
        """Return how many shards are done."""
        return len(list(self.out.glob("done/*/*.json")))

    def random_moment(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for a moment from the start of the workers of a process to the last shard, all as likely by shard."""
        done = self.rng.randrange(self.shards)
        self.until(lambda: process.poll() is not None or (self.workers() and self.done() >= done))
        time.sleep(self.rng.uniform(0, 0.6 if done else 3))

    def kill(self, *processes: int) -> None:
        """Kill processes, at once."""
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    # What it has to be in the end

    def made_again(self) -> int:
        """Return how many shards were begun once more, by another process."""
        processes = defaultdict(set)
        for process, name in self.opened():
            if name in self.bench.names:
                processes[self.bench.names.index(name) // self.bench.shard].add(process)
        return sum(len(those) - 1 for those in processes.values())

    def opened(self) -> list[tuple[str, str]]:
        """Return which process opened which photo, in order."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(process, name) for process, name in map(str.split, lines)]

    def hangs(self) -> int:
        """Return how many processes have begun to hang."""
        return sum(name == "hang" for _, name in self.opened())

    def check_left(self) -> None:
        """Check that no process, claim or temporary file is left."""
        check(not self.workers(), "workers have not left")
        left = [*self.out.glob("claims*"), *self.out.glob("workers*"), *self.out.rglob("*.tmp")]
        check(not left, f"left: {left}")

    def check_equal(self) -> None:
        """Check that the output folder is that of a quiet run, and that no work was done again without a cause."""
        found, expected = tree(self.out), tree(self.bench.expected(self.layout))
        differing = sorted(
            name for name in found.keys() | expected.keys() if found.get(name, 0) != expected.get(name, 0)
        )
        check(not differing, f"not as of a quiet run: {differing}")
        pairs = [(row["id"], row["k"]) for row in self.rows("manifest.jsonl")]
        readable = [name for name in self.bench.names if name != "broken.png"]
        check(sorted(pairs) == [(name, k) for name in readable for k in range(3)], pairs)
        check(not self.workers(), "workers have not left")
        again = self.made_again()
        check(again <= self.lost + self.spoiled, f"{again} shards made again, {self.lost} workers lost")

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / name).read_text().splitlines()]

    def copy_quiet(self) -> None:
        """Begin with the output folder of a quiet run."""
        shutil.copytree(self.bench.expected(self.layout), self.out)

    def plan_only(self) -> None:
        """Begin with the plan alone."""
        shutil.copytree(self.bench.expected(self.layout) / "plan", self.out / "plan")


# Rows


def left_alone(r: Round) -> None:
    """Two workers, and nothing happens to them."""
    r.end(r.run(2))
    r.check_equal()


def worker_killed(r: Round) -> None:
    """SIGKILL of one of two workers."""
    driver = r.run(2)
    r.random_moment(driver)
    if workers := r.workers():
        r.kill(r.rng.choice(workers))
        r.lost = 1
    r.end(driver)
    r.check_equal()


def driver_killed(r: Round) -> None:
    """SIGKILL of the driver, whose workers leave by themselves; the same command, at once or after that."""
    driver = r.run(2)
    if r.rng.random() < 0.2:
        time.sleep(r.rng.uniform(0, 3))  # while it plans
    else:
        r.random_moment(driver)
    r.lost = len(r.workers())
    r.kill(driver.pid)
    if r.rng.random() < 0.5:
        r.until(lambda: not r.workers())
    r.end(r.run(2))
    r.check_equal()


def all_killed(r: Round) -> None:
    """SIGKILL of the driver and its workers; then one worker."""
    driver = r.run(2)
    r.random_moment(driver)
    workers = r.workers()
    r.lost = len(workers)
    r.kill(driver.pid, *workers)
    r.end(r.run(1))
    r.check_equal()


def two_drivers(r: Round) -> None:
    """Two drivers on one output folder at once."""
    first = r.run(1)
    time.sleep(r.rng.uniform(0, 2))
    second = r.run(1)
    r.end(first)
    r.end(second)
    r.check_equal()


def parts(r: Round) -> None:
    """--part 0/2 and 1/2, in two processes."""
    processes = [r.run(1, "--part", f"{index}/2") for index in range(2)]
    for process in processes:
        r.end(process)
    r.check_equal()


def markers_spoiled(r: Round) -> None:
    """Markers that are cut, empty, with one wrong bit; then two that are swapped."""
    r.copy_quiet()
    markers = sorted(r.out.glob("done/*/*.json"))
    r.rng.shuffle(markers)
    cut, empty, bit = markers[:3]
    cut.write_bytes(cut.read_bytes()[: r.rng.randrange(1, cut.stat().st_size)])
    empty.write_bytes(b"")
    flip_bit(bit, r.rng)
    r.end(r.run(2))
    again = {path: path.read_bytes() for path in markers[:2]}
    for path, content in zip(again, reversed(again.values()), strict=True):
        path.write_bytes(content)
    r.spoiled = 2
    r.end(r.run(1))
    r.check_equal()
    made = {r.bench.names.index(name) // r.bench.shard for _, name in r.opened()}
    check(made == {int(path.stem) for path in markers[:3]}, f"other shards were made: {made}")


def picture_spoiled(r: Round) -> None:
    """A wrong bit in an image, which verify finds."""
    r.copy_quiet()
    picture = r.rng.choice([path for name in ("images", "shards") for path in r.out.glob(f"{name}/**/*.*")])
    flip_bit(picture, r.rng)
    r.end(r.start("verify", str(r.out)), 75)
    r.end(r.run(1))
    r.check_equal()
    r.end(r.start("verify", str(r.out)))


def flip_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def poison(r: Round) -> None:
    """A photo that kills every process that opens it."""
    name = r.rng.choice([name for name in r.bench.names if name != "broken.png"])
    r.end(r.run(2, poison=name))
    deaths = sum(opened == name for _, opened in r.opened())
    check(1 <= deaths <= 4, f"{deaths} deaths")
    r.lost = deaths
    check(r.made_again() <= deaths, f"{r.made_again()} shards made again")
    errors = {row["id"]: row["error"] for row in r.rows("errors.jsonl")}
    check(errors.keys() == {name, "broken.png"} and "processes died" in errors[name], errors)
    expected = bytes_by_file(r.bench.expected(r.layout))
    found = bytes_by_file(r.out)
    check(found == {key: data for key, data in expected.items() if key[0] != name}, "images are not equal")
    usual = {"plan", "done", "rows", "manifest.jsonl", "errors.jsonl", "images" if r.layout == "files" else "shards"}
    check(set(os.listdir(r.out)) == usual, os.listdir(r.out))
    r.end(r.start("verify", str(r.out)))


def bytes_by_file(out: Path) -> dict[tuple[str, int], str]:
    """Return the digest of each image by input and variation."""
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    return {(row["id"], row["k"]): row["sha256"] for row in rows}


def full_disk(r: Round) -> None:
    """A full disk, a tmpfs of a few pages: exit status 74 at once; then with room."""
    r.bench.expected(r.layout)
    r.lost = 1
    if run_in_child(lambda: full_disk_in_namespace(r)):
        raise RoundError(f"see above; {r.errors.read_text()[-2000:]}")


def full_disk_in_namespace(r: Round) -> None:
    r.out.mkdir()
    check(mount(b"tmpfs", "none", r.out, b"size=64m"), "a tmpfs cannot be mounted here")
    filler, page = r.out / "plan" / "filler", os.sysconf("SC_PAGE_SIZE")
    shutil.copytree(r.bench.expected(r.layout) / "plan", r.out / "plan")
    needed = sum(-(-len(data or b"") // page) * page for data in tree(r.bench.expected(r.layout)).values())
    room = int(needed * r.rng.uniform(0, 0.9)) // page * page
    filler.touch()
    free = shutil.disk_usage(r.out).free - room
    with filler.open("wb") as file:
        file.truncate(free)
        os.posix_fallocate(file.fileno(), 0, free)
    r.end(r.run(1), 74)
    text = r.errors.read_text()
    check(text.count("room on the disk") == 1 and " free" in text, text)
    check("more are needed" in text or not r.done(), text)
    check(
        not list(r.out.glob("claims/*")) and not list(r.out.glob("workers/*/*")), "claims or temporary files are left"
    )
    filler.unlink()
    r.end(r.run(1))
    r.check_equal()


def terminated(r: Round) -> None:
    """SIGTERM of the driver, exit status 143 with nothing left of its processes; the same command."""
    driver = r.run(2)
    r.random_moment(driver)
    r.lost = len(r.workers())
    driver.terminate()
    r.end(driver, 143 if driver.poll() is None else 0)
    r.check_left()
    r.end(r.run(2))
    r.check_equal()


def terminated_while_loading(r: Round) -> None:
    """SIGTERM of the driver while its worker waits for a file of the model; the same command."""
    driver = r.run(1, hang="model_index.json")
    r.until(r.hangs)
    driver.terminate()
    r.end(driver, 143)
    r.check_left()
    r.end(r.run(1))
    r.check_equal()


def interrupted_twice(r: Round) -> None:
    """Ctrl-C while a worker waits for a photo, which would take for ever, and once more; with a driver and without."""
    r.plan_only()
    name = r.rng.choice(r.bench.names)
    for start in (lambda: r.run(1, hang=name), lambda: r.start("join", str(r.out), hang=name)):
        process, hangs = start(), r.hangs()
        r.lost += 1
        r.until(lambda hangs=hangs: r.hangs() > hangs)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        check(process.poll() is None, "the first interrupt did not wait for the worker")
        process.send_signal(signal.SIGINT)
        r.end(process, 130)
        r.check_left()
    r.end(r.run(1))
    r.check_equal()


def given_up(r: Round) -> None:
    """A model whose loading kills every worker: exit status 70; then the same command with one that does not."""
    r.end(r.run(1, "--tries", "1", poison="model_index.json"), 70)
    r.check_left()
    r.end(r.run(1))
    r.check_equal()


def skewed_clocks(r: Round) -> None:
    """Claims and folders of dead workers of this machine and another, from the past and the future."""
    r.plan_only()
    (r.out / "claims").mkdir()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as dead:
        here = process_name(dead.pid)
    hour = 3600 * r.rng.uniform(0.1, 1000)
    other_boot = here.replace(machine(), "0123456789ab")
    host, digest, pid, *_ = process_name().split("-")
    reused = f"{host}-{digest}-{pid}-1-00000000"  # a living process has its number
    elsewhere = [f"elsewhere-fedcba987654-{number}-1-00000000" for number in range(3)]
    owners = {here: 0.0, reused: 0.0, other_boot: -hour, elsewhere[0]: hour, "written by hand": -hour}
    for number, (owner, seconds) in enumerate(owners.items()):
        (r.out / "workers" / owner).mkdir(parents=True)
        (r.out / "workers" / owner / "0000000").write_bytes(b"cut")
        (r.out / "claims" / f"{number % r.shards:07d}").write_text(owner)
        move_clock(r.out / "workers" / owner, seconds)
    (r.out / "claims" / f"{r.shards - 1:07d}").write_text(elsewhere[1])  # without a folder
    (r.out / f".plan.{elsewhere[0]}.tmp").mkdir()
    move_clock(r.out / f".plan.{elsewhere[0]}.tmp", hour)
    living = elsewhere[2]
    (r.out / "workers" / living).mkdir()
    (r.out / "claims" / f"{0:07d}").write_text(living)
    driver = r.run(2)
    r.until(lambda: r.done() == r.shards - 1)
    time.sleep(1)
    check(r.done() == r.shards - 1, "a living worker of another machine lost its claim")
    move_clock(r.out / "workers" / living, r.rng.choice([-1, 1]) * hour)
    r.end(driver)
    r.check_equal()


def move_clock(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() + seconds,) * 2)


ROWS = {
    "left alone": left_alone,
    "worker killed": worker_killed,
    "driver killed": driver_killed,
    "all killed": all_killed,
    "two drivers": two_drivers,
    "parts": parts,
    "markers spoiled": markers_spoiled,
    "picture spoiled": picture_spoiled,
    "poison": poison,
    "full disk": full_disk,
    "terminated": terminated,
    "terminated while loading": terminated_while_loading,
    "interrupted twice": interrupted_twice,
    "given up": given_up,
    "skewed clocks": skewed_clocks,
}


def rounds_of(bench: Bench, row: str, layout: str, count: int, seed: int) -> Iterator[tuple[str, int, int]]:
    """Run a row, and yield for each round why it failed, if it did, the workers lost and the shards made again."""
    for index in range(count):
        with Round(bench, layout, random.Random(f"{seed} {row} {layout} {index}")) as r:
            failure = ""
            try:
                ROWS[row](r)
            except (RoundError, subprocess.TimeoutExpired) as error:
                failure = str(error)
            yield failure, r.lost, r.made_again()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the random moments")
    parser.add_argument("--photos", type=int, default=6, metavar="N", help="5 or more")
    parser.add_argument("--format", choices=("files", "tar", "parquet"), help="default: all")
    parser.add_argument("--keep", action="store_true", help="keep the folders, and print where they are")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    args = parser.parse_args(arguments)
    if unknown := set(args.rows) - ROWS.keys():
        parser.error(f"no such row: {min(unknown)}")
    folder, failed = Path(tempfile.mkdtemp(prefix="kill-batch-")), False
    print("| row | format | rounds | equal | workers lost | shards made again | seconds |", "|---" * 7 + "|", sep="\n")
    try:
        bench = Bench(folder, args.photos)
        layouts = (args.format,) if args.format else ("files", "tar", "parquet")
        for layout in layouts:
            bench.expected(layout)
        for row in args.rows or ROWS:
            for layout in layouts:
                start = time.monotonic()
                results = list(rounds_of(bench, row, layout, args.rounds, args.seed))
                equal, lost, again = (
                    sum(column) for column in zip(*((not f, n, m) for f, n, m in results), strict=True)
                )
                seconds = time.monotonic() - start
                cells = (row, layout, len(results), equal, lost, again, f"{seconds:.0f}")
                print("|", " | ".join(map(str, cells)), "|", flush=True)
                for failure in filter(None, (failure for failure, _, _ in results)):
                    failed = True
                    print(failure, file=sys.stderr, flush=True)
    finally:
        if args.keep:
            print(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
