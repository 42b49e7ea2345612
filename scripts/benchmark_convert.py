"""Time weights_convert.py at the published size, and hold its memory to a limit.

    python scripts/benchmark_convert.py                             # about half an hour on 2 cores, 26 GB of disk
    python scripts/benchmark_convert.py --folder DIR --rounds 5     # keeps its sources in DIR, finds them there again
    python scripts/benchmark_convert.py --tiny --rounds 1           # to see whether everything runs

Its rivals are diffusers, where it can do the same, and a plain copy of as many bytes. They take turns. Each begins with
its source out of the page cache (or all in it: --cache warm) and nothing left to write; the table has medians. Memory
is sampled every 10 ms: RssAnon is what a process needs, RssFile what it has mapped and the system may take back. The
exit status is 1 if weights_convert.py fails, or needs more than the largest part and 1 GB.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

SCRIPTS = Path(__file__).resolve().parent
GB = 1e9
SPARE = GB
TICK = 0.01


@dataclass(frozen=True)
class Run:
    """One run of one case."""

    seconds: float
    on_disk: float  # seconds until all that it wrote was there
    cpu: float
    anon: int
    file: int
    written: int
    error: str = ""


@dataclass(frozen=True)
class Case:
    """A command, to which TARGET is added at its place, and its runs."""

    name: str
    source: Path
    command: list[str]
    ours: bool = False
    runs: list[Run] = field(default_factory=list)

    @property
    def error(self) -> str:
        return next((run.error for run in self.runs if run.error), "")

    def of(self, what: str) -> float:
        return median(getattr(run, what) for run in self.runs)

    def cells(self) -> list[str]:
        if self.error:
            return [self.name, "-", "-", "-", "-", "-", "-", self.error]
        seconds = (f"{self.of(what):.1f}" for what in ("seconds", "on_disk", "cpu"))
        return [self.name, *seconds, *(f"{self.of(what) / GB:.2f}" for what in ("anon", "file", "written")), ""]


# The sources


def make(target: Path, script: str, *options: str) -> Path:
    """What a script writes, unless it is there already."""
    if not target.exists():
        print(f"{target.name}: being made", file=sys.stderr, flush=True)
        unfinished = target.with_name(f"unfinished-{target.name}")
        subprocess.run([sys.executable, SCRIPTS / script, unfinished, *options], check=True, stdout=subprocess.DEVNULL)
        unfinished.rename(target)
    return target


def cases(folder: Path, converter: Path, tiny: bool, optimizer: bool) -> list[Case]:
    size = ["--tiny"] if tiny else []
    pickles = make(folder / "diffusers", "published_checkpoint.py", "--only", ".bin", *size)
    full = make(folder / "full.ckpt", "original_checkpoint.py", "--layout", "full", *size)
    v2 = make(folder / "v2.ckpt", "original_checkpoint.py", "--layout", "v2", *size)
    ours, theirs = [sys.executable, str(converter)], [sys.executable, str(SCRIPTS / "diffusers_convert.py")]
    copy, config = ["cp", "-r", "--reflink=never"], ["--config", str(pickles)]
    settings = config if tiny else []

    def case(name: str, source: Path, command: list[str], *options: str) -> Case:
        return Case(name, source, [*command, str(source), "TARGET", *options], command is ours)

    found = [
        case("full.ckpt, ours", full, ours, *settings),
        case("full.ckpt, diffusers", full, theirs, *config),
        case("v2.ckpt, ours", v2, ours, *settings),
        case("v2.ckpt without CLIP, diffusers", v2, theirs, *config),
        case("v2.ckpt, plain copy", v2, copy),
        case("folder of .bin, ours", pickles, ours),
        case("folder of .bin, diffusers", pickles, theirs),
        case("folder of .bin, plain copy", pickles, copy),
        case("folder of .bin to fp16, ours", pickles, ours, "--dtype", "fp16"),
        case("folder of .bin to fp16, diffusers", pickles, theirs, "--dtype", "fp16"),
    ]
    if optimizer:
        trained = make(folder / "trained.ckpt", "original_checkpoint.py", "--layout", "full", "--optimizer", *size)
        found.insert(1, case("full.ckpt with optimizer, ours", trained, ours, *settings))
    return found


# Measuring


def files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path] * path.exists()


def prepare(source: Path, cache: str) -> None:
    """Nothing left to write, and the source out of the page cache or in it."""
    os.sync()
    for path in files(source):
        with path.open("rb") as file:
            if cache == "cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while cache == "warm" and file.read(1 << 24):
                pass


def memory(pid: int) -> tuple[int, int]:
    """RssAnon and RssFile of a process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = dict(re.findall(r"^(Rss\w+):\s+(\d+) kB", status, re.MULTILINE))
    return int(found.get("RssAnon", 0)) * 1024, int(found.get("RssFile", 0)) * 1024


def measure(command: list[str], target: Path) -> Run:
    with tempfile.TemporaryFile() as messages:
        start, anon, mapped, ended = time.perf_counter(), 0, 0, 0
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=messages)
        while not ended:
            now = memory(child.pid)
            anon, mapped = max(anon, now[0]), max(mapped, now[1])
            time.sleep(TICK)
            ended, status, used = os.wait4(child.pid, os.WNOHANG)
        seconds, child.returncode = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
        messages.seek(0)
        last = messages.read().decode(errors="replace").replace(f"{target.parent}/", "").strip().rpartition("\n")[2]
    for path in files(target):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    on_disk = time.perf_counter() - start
    written = sum(path.stat().st_size for path in files(target))
    error = f"exit status {child.returncode}: {last}" if child.returncode else ""
    return Run(seconds, on_disk, used.ru_utime + used.ru_stime, anon, mapped, written, error)


def clear(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.unlink(missing_ok=True)


def benchmark(turns: list[Case], folder: Path, cache: str, rounds: int, seconds: float) -> None:
    """Rounds in which each has its turn, as many as can begin in time; the first always does."""
    end, target = time.monotonic() + seconds, folder / "target"
    for i in range(rounds):
        if i and time.monotonic() > end:
            break
        for case in turns:
            if case.error:
                continue
            clear(target)
            prepare(case.source, cache)
            run = measure([str(target) if word == "TARGET" else word for word in case.command], target)
            case.runs.append(run)
            print(f"{i + 1}: {case.name}: {run.error or f'{run.seconds:.1f} s'}", file=sys.stderr, flush=True)
    clear(target)


# The report


def table(turns: Iterable[Case]) -> str:
    head = ["", "seconds", "until on disk", "CPU seconds", "peak RssAnon, GB", "peak RssFile, GB", "written, GB", ""]
    lines = [head, ["---", *["---:"] * 6, "---"], *(case.cells() for case in turns)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> dict[str, object]:
    model = re.search(r"^model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    packages = ("torch", "safetensors", "diffusers", "transformers")
    return {
        "CPU": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "GiB of memory": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "Linux": platform.release(),
        "threads": os.environ.get("OMP_NUM_THREADS", "their own choice"),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for sources, which stay there, and targets, which do not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no other round after so many")
    parser.add_argument("--cache", choices=("cold", "warm"), default="cold", help="the sources in the page cache")
    parser.add_argument("--optimizer", action="store_true", help="also one with AdamW's moments: 15 GB, at first 30")
    parser.add_argument("--only", metavar="WORDS", default="", help="only what has this in its name, such as ours")
    parser.add_argument("--tiny", action="store_true", help="tiny sources")
    parser.add_argument("--converter", type=Path, default=SCRIPTS.parent / "weights_convert.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every run's numbers here")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="imvar-convert-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        turns = [case for case in cases(folder, args.converter, args.tiny, args.optimizer) if args.only in case.name]
        limit = max(path.stat().st_size for path in files(folder / "diffusers")) + SPARE
        benchmark(turns, folder, args.cache, args.rounds, args.seconds)
    finally:
        if not args.folder:
            shutil.rmtree(folder)
    most = max((run.anon for case in turns if case.ours for run in case.runs), default=0)
    ok = most <= limit and not any(case.error for case in turns if case.ours)
    about = {
        "ok": ok,
        "rounds": max((len(case.runs) for case in turns), default=0),
        "page cache": args.cache,
        "size": "tiny" if args.tiny else "published",
        **machine(),
    }
    about |= {"our peak RssAnon, GB": round(most / GB, 2), "limit, GB": round(limit / GB, 2)}
    print(table(turns), ", ".join(f"{key}: {value}" for key, value in about.items()), sep="\n\n")
    if args.json:
        rows = [{"name": case.name, "runs": [asdict(run) for run in case.runs]} for case in turns]
        args.json.write_text(json.dumps(about | {"cases": rows}, indent=2) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
