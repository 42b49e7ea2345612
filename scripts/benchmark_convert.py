"""Benchmark weights_convert.py at the published size, and check that its memory stays below a limit.

    python scripts/benchmark_convert.py                             # about half an hour on 2 cores, 26 GB of disk
    python scripts/benchmark_convert.py --folder DIR --rounds 5     # keep the sources in DIR for another run
    python scripts/benchmark_convert.py --tiny --rounds 1           # check that everything runs

Compared are diffusers, for the conversions that it supports, and a plain copy of the same files, in interleaved rounds.
Each run starts with its source out of the page cache (--cache warm: in it) and all earlier writes flushed; the table
has medians. Memory is sampled every 10 ms: RssAnon is private memory, RssFile is mapped files, which the system can
reclaim. The exit status is 1 if weights_convert.py fails, or its RssAnon exceeds the largest part by more than 1 GB.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GB = 1e9
MEMORY_MARGIN = GB
SAMPLE_INTERVAL = 0.01  # seconds


@dataclass(frozen=True)
class Run:
    """Measurements of one run of one case, in seconds and bytes."""

    seconds: float
    on_disk: float  # seconds until its output is flushed
    cpu: float
    anon: int  # peak RssAnon
    file: int  # peak RssFile
    written: int
    error: str = ""


@dataclass(frozen=True)
class Case:
    """A command, in which the word TARGET is replaced by the output path, and its runs."""

    name: str
    source: Path
    command: list[str]
    is_imvar: bool = False
    runs: list[Run] = field(default_factory=list)

    @property
    def error(self) -> str:
        return next((run.error for run in self.runs if run.error), "")

    def median(self, field: str) -> float:
        return statistics.median(getattr(run, field) for run in self.runs)

    def cells(self) -> list[str]:
        if self.error:
            return [self.name, "-", "-", "-", "-", "-", "-", self.error]
        seconds = (f"{self.median(field):.1f}" for field in ("seconds", "on_disk", "cpu"))
        return [self.name, *seconds, *(f"{self.median(field) / GB:.2f}" for field in ("anon", "file", "written")), ""]


# The sources


def make_source(target: Path, module: str, *options: str) -> Path:
    """Write a source checkpoint by a module of tests/support, unless it exists."""
    if not target.exists():
        print(f"writing {target.name}", file=sys.stderr, flush=True)
        unfinished = target.with_name(f"unfinished-{target.name}")
        command = [sys.executable, "-m", f"tests.support.{module}", unfinished.absolute(), *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        unfinished.rename(target)
    return target


def all_cases(folder: Path, converter: Path, tiny: bool, optimizer: bool) -> list[Case]:
    size = ["--tiny"] if tiny else []
    pickles = make_source(folder / "diffusers", "published_checkpoint", "--only", ".bin", *size)
    full = make_source(folder / "full.ckpt", "original_checkpoint", "--layout", "full", *size)
    v2 = make_source(folder / "v2.ckpt", "original_checkpoint", "--layout", "v2", *size)
    imvar = [sys.executable, str(converter)]
    diffusers = [sys.executable, str(ROOT / "scripts" / "benchmark_convert_diffusers.py")]
    copy, config = ["cp", "-r", "--reflink=never"], ["--config", str(pickles)]
    settings = config if tiny else []

    def case(name: str, source: Path, command: list[str], *options: str) -> Case:
        return Case(name, source, [*command, str(source), "TARGET", *options], command is imvar)

    cases = [
        case("full.ckpt, imvar", full, imvar, *settings),
        case("full.ckpt, diffusers", full, diffusers, *config),
        case("v2.ckpt, imvar", v2, imvar, *settings),
        case("v2.ckpt without CLIP, diffusers", v2, diffusers, *config),
        case("v2.ckpt, plain copy", v2, copy),
        case("folder of .bin, imvar", pickles, imvar),
        case("folder of .bin, diffusers", pickles, diffusers),
        case("folder of .bin, plain copy", pickles, copy),
        case("folder of .bin to fp16, imvar", pickles, imvar, "--dtype", "fp16"),
        case("folder of .bin to fp16, diffusers", pickles, diffusers, "--dtype", "fp16"),
    ]
    if optimizer:
        trained = make_source(folder / "trained.ckpt", "original_checkpoint", "--layout", "full", "--optimizer", *size)
        cases.insert(1, case("full.ckpt with optimizer, imvar", trained, imvar, *settings))
    return cases


# Measuring


def files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path] * path.exists()


def prepare(source: Path, cache: str) -> None:
    """Flush pending writes, and put the source out of the page cache or into it."""
    os.sync()
    for path in files(source):
        with path.open("rb") as file:
            if cache == "cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while cache == "warm" and file.read(1 << 24):
                pass


def memory(pid: int) -> tuple[int, int]:
    """Return RssAnon and RssFile of a process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(re.findall(r"^(Rss\w+):\s+(\d+) kB", status, re.MULTILINE))
    return int(fields.get("RssAnon", 0)) * 1024, int(fields.get("RssFile", 0)) * 1024


def measure(command: list[str], target: Path) -> Run:
    with tempfile.TemporaryFile() as messages:
        start, anon, mapped, pid = time.perf_counter(), 0, 0, 0
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=messages)
        while not pid:  # still running
            now = memory(child.pid)
            anon, mapped = max(anon, now[0]), max(mapped, now[1])
            time.sleep(SAMPLE_INTERVAL)
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        seconds, child.returncode = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
        messages.seek(0)
        last_line = (
            messages.read().decode(errors="replace").replace(f"{target.parent}/", "").strip().rpartition("\n")[2]
        )
    for path in files(target):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    on_disk = time.perf_counter() - start
    written = sum(path.stat().st_size for path in files(target))
    error = f"exit status {child.returncode}: {last_line}" if child.returncode else ""
    return Run(seconds, on_disk, usage.ru_utime + usage.ru_stime, anon, mapped, written, error)


def clear(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.unlink(missing_ok=True)


def run_rounds(cases: list[Case], folder: Path, cache: str, rounds: int, seconds: float) -> None:
    """Run all cases once per round; start no round after `seconds`, except the first."""
    end, target = time.monotonic() + seconds, folder / "target"
    for i in range(rounds):
        if i and time.monotonic() > end:
            break
        for case in cases:
            if case.error:
                continue
            clear(target)
            prepare(case.source, cache)
            run = measure([str(target) if word == "TARGET" else word for word in case.command], target)
            case.runs.append(run)
            print(f"{i + 1}: {case.name}: {run.error or f'{run.seconds:.1f} s'}", file=sys.stderr, flush=True)
    clear(target)


# The report


def table(cases: Iterable[Case]) -> str:
    head = ["", "seconds", "until on disk", "CPU seconds", "peak RssAnon, GB", "peak RssFile, GB", "written, GB", ""]
    lines = [head, ["---", *["---:"] * 6, "---"], *(case.cells() for case in cases)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> dict[str, object]:
    model = re.search(r"^model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    packages = ("torch", "safetensors", "diffusers", "transformers")
    return {
        "CPU": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "GiB of memory": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "Linux": platform.release(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for sources, which are kept, and targets, which are deleted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no round after this time")
    parser.add_argument(
        "--cache", choices=("cold", "warm"), default="cold", help="sources in the page cache (warm) or not (cold)"
    )
    parser.add_argument(
        "--optimizer", action="store_true", help="also a checkpoint with AdamW state: 15 GB, 30 GB while it is written"
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="only cases whose name contains this, such as imvar")
    parser.add_argument("--tiny", action="store_true", help="tiny sources")
    parser.add_argument("--converter", type=Path, default=ROOT / "weights_convert.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers of each run here")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="imvar-convert-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        selected = [
            case for case in all_cases(folder, args.converter, args.tiny, args.optimizer) if args.only in case.name
        ]
        limit = max(path.stat().st_size for path in files(folder / "diffusers")) + MEMORY_MARGIN
        run_rounds(selected, folder, args.cache, args.rounds, args.seconds)
    finally:
        if not args.folder:
            shutil.rmtree(folder)
    peak = max((run.anon for case in selected if case.is_imvar for run in case.runs), default=0)
    ok = peak <= limit and not any(case.error for case in selected if case.is_imvar)
    about = {
        "ok": ok,
        "rounds": max((len(case.runs) for case in selected), default=0),
        "page cache": args.cache,
        "size": "tiny" if args.tiny else "published",
        **machine(),
    }
    about |= {"peak RssAnon of imvar, GB": round(peak / GB, 2), "limit, GB": round(limit / GB, 2)}
    print(table(selected), ", ".join(f"{key}: {value}" for key, value in about.items()), sep="\n\n")
    if args.json:
        rows = [{"name": case.name, "runs": [asdict(run) for run in case.runs]} for case in selected]
        args.json.write_text(json.dumps(about | {"cases": rows}, indent=2) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
