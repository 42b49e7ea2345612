"""Measure what `imvar batch` costs beside the model: CPU time, idle workers, memory, and the time for many markers.

    python scripts/benchmark_batch.py [--suites overhead workers plan markers] [--rounds 5] [--markers 100000]
    python scripts/benchmark_batch.py --suites scale --items 10000000

overhead: CPU time of a batch beside a loop of load, call and save, with a pipeline that answers at once.
workers: images by processes whose pipeline sleeps, from the first claim to the last marker, beside no cost at all.
plan: CPU time and memory of planning many files.
markers: a finished batch of one input a shard is listed, reported, checked, and run again.
scale: many inputs in parquet files are planned in shards of 64, and a finished batch of one variation of each, of which
    only the images are missing, is reported, checked and resumed; then what the images would cost.

The last column has the limits. Nothing else should run meanwhile. Memory is read from Linux's /proc.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import PIL
import torch
from PIL import Image

from imvar import batch, load_image
from imvar.batch.finish import batch_report, write_manifest
from imvar.batch.finish import markers as markers_of
from imvar.batch.store import GROUP, Marker, Store, rows_as_bytes, sha256
from imvar.batch.worker import work
from imvar.loading import load_pipeline
from imvar.records.files import write_image

ROOT = Path(__file__).resolve().parents[1]
PHOTO = ROOT / "tests" / "photos" / "chelsea.jpg"
SUITES = ("overhead", "workers", "plan", "markers", "scale")
VARIATIONS = 4
MEASURE_CODE = """
import re, sys, time
from pathlib import Path
from imvar import batch, cli
from imvar.batch.finish import batch_report, is_bad, write_manifest
from imvar.batch.store import Store

def megabytes():  # of this program, where getrusage counts the one that started it as well
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

before, start, cpu = megabytes(), time.perf_counter(), time.process_time()
exec(sys.argv[1])
print("measured", time.perf_counter() - start, time.process_time() - cpu, megabytes(), megabytes() - before)
"""
PLAN_CODE = "batch.plan(sys.argv[2], sys.argv[3], checkpoint='imvar/missing')"
SCALE_SUITE = {
    "planned": "batch.plan(sys.argv[2], sys.argv[3], checkpoint='imvar/missing', n=1, format='parquet')",
    "plan opened, and its file checked": "batch.open_plan(sys.argv[3]).offsets",
    "markers listed": "Store(Path(sys.argv[3])).done()",
    "`imvar batch status`": "cli.main(['batch', 'status', sys.argv[3]])",
    "all markers and rows checked": "store, plan = Store(Path(sys.argv[3])), batch.open_plan(sys.argv[3])\n"
    "assert not any(is_bad(store, plan, number) for number in range(len(plan)))",
    "manifest written": "assert write_manifest(Store(Path(sys.argv[3])), batch.open_plan(sys.argv[3]))",
    "`imvar batch join`, with all done": "cli.main(['batch', 'join', sys.argv[3]])",
}
"""What is measured, each in a process of its own, of argv[2], the inputs, and argv[3], the output folder."""
IN_FILE = 100_000  # inputs
IMAGE_SECONDS, IMAGE_BYTES = 1.0, 330_000  # on an H200, and as PNG with 512 px


@dataclass
class InstantPipeline:
    """A pipeline that returns prebuilt images after `sleep` seconds."""

    image: Image.Image
    record: dict[str, Any] | None = None
    sleep: float = 0.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __call__(self, image: Any, seed: list[int], **_: Any) -> SimpleNamespace:
        time.sleep(self.sleep)
        rows = len(seed)
        return SimpleNamespace(
            images=[self.image] * rows,
            nsfw_content_detected=[False] * rows,
            scores=[{"bad_concepts": []}] * rows,
            records=self.record and [self.record] * rows,
        )


def photo_of_size(size: int) -> Image.Image:
    return Image.open(PHOTO).convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


# Overhead


def overhead(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str, str]]:
    torch.set_num_threads(1)
    real = load_pipeline("imvar-emoji", None, None, torch.float32)
    for size, inputs in ((64, args.inputs), (512, max(1, args.inputs // 16))):
        image = photo_of_size(size)
        record = real.records(image, seed=[0] * VARIATIONS, num_images_per_prompt=VARIATIONS, height=64, width=64)[0]
        pipe, photos = InstantPipeline(image, record), folder / f"photos-{size}"
        photos.mkdir()
        for k in range(inputs):
            image.save(photos / f"{k:05d}.png")
        loops, batches = [], []
        for k in range(args.rounds):
            loops.append(cpu_seconds(plain_loop, photos, folder / f"loop-{size}-{k}", pipe) / inputs / VARIATIONS)
            batches.append(cpu_seconds(whole_batch, photos, folder / f"batch-{size}-{k}", pipe) / inputs / VARIATIONS)
        loop, more = median(loops), median(b - a for a, b in zip(loops, batches, strict=True))
        yield f"plain loop, {size} px, CPU a variation", f"{1000 * loop:.2f} ms", ""
        limit = "0.5 ms" if size == 64 else "2 %"
        yield f"more in a batch, {size} px", f"{1000 * more:.2f} ms, {100 * more / loop:.1f} %", limit


def plain_loop(photos: Path, out: Path, pipe: InstantPipeline) -> None:
    out.mkdir()
    for path in sorted(photos.iterdir()):
        made = pipe(load_image(path), seed=list(range(VARIATIONS)), num_images_per_prompt=VARIATIONS)
        for k, image in enumerate(made.images):
            write_image(image, out / f"{path.stem}-{k}.png", record=made.records[k])


def whole_batch(photos: Path, out: Path, pipe: InstantPipeline) -> None:
    batch.plan(photos, out, checkpoint="imvar-emoji", n=VARIATIONS, batch=VARIATIONS)
    assert work(out, load=lambda _: pipe)


def cpu_seconds(function: Callable[..., object], *arguments: Any) -> float:
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


# Workers


def workers(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str, str]]:
    image = photo_of_size(64)
    for count in args.workers:
        photos, out, calls = folder / f"photos-of-{count}", folder / f"workers-{count}", args.calls * count
        photos.mkdir()
        for k in range(calls):
            image.save(photos / f"{k:05d}.png")
        batch.plan(photos, out, checkpoint="imvar-emoji", n=VARIATIONS, batch=VARIATIONS, shard=1, metadata=False)
        spawn = multiprocessing.get_context("spawn")
        barrier, starts = spawn.Barrier(count), spawn.Queue()
        processes = [spawn.Process(target=sleepy_work, args=(out, args.sleep, barrier, starts)) for _ in range(count)]
        for process in processes:
            process.start()
        first = min(starts.get() for _ in processes)
        for process in processes:
            process.join()
        last = max(path.stat().st_mtime for path in out.glob("done/*/*.json"))
        share = calls * args.sleep / count / (last - first)
        limit = "90 %" if count == 8 else ""
        yield (
            f"{count} worker{'s' * (count > 1)}, {args.calls} calls of {args.sleep} s each",
            f"{100 * share:.1f} % of ideal",
            limit,
        )


def sleepy_work(out: Path, sleep: float, barrier: Any, starts: Any) -> None:
    """Work once all processes are ready: they have imported everything, and decoded and encoded an image."""
    pipe = InstantPipeline(load_image(PHOTO).resize((64, 64)), sleep=sleep)
    write_image(pipe.image, io.BytesIO())
    barrier.wait()
    starts.put(time.time())
    work(out, load=lambda _: pipe)


# Plan


def plan(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str, str]]:
    tree = folder / "tree"
    make_tree(tree, args.files)
    _, seconds, peak, more = measured(PLAN_CODE, tree, folder / "planned")
    size = sum(path.stat().st_size for path in (folder / "planned" / "plan").iterdir()) / 2**20
    yield f"plan of {args.files} files, CPU", f"{seconds:.2f} s", "3 s"
    yield "its peak of memory beyond the imports'", f"{more:.0f} MB", "100 MB"
    yield "peak of the process", f"{peak:.0f} MB", ""
    yield "plan on the disk", f"{size:.1f} MB", ""


def measured(code: str, *arguments: Path) -> list[float]:
    """Run code in a process; return its seconds, also those of CPU, its peak of memory and that beyond the imports'."""
    command = [sys.executable, "-c", MEASURE_CODE, code, *map(str, arguments)]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment()).stdout
    return [float(number) for number in text.rpartition("measured")[2].split()]


def make_tree(tree: Path, files: int) -> None:
    """Create empty files in folders of a hundred."""
    for k in range(files):
        path = tree / f"{k // 10_000:03d}" / f"{k // 100:05d}" / f"photo-{k:07d}.jpg"
        if k % 100 == 0:
            path.parent.mkdir(parents=True)
        path.touch()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


# Markers


def markers(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str, str]]:
    tree, out = folder / "tree-of-markers", folder / "finished"
    make_tree(tree, args.markers)
    # workers that load the model fail, since there is none
    made = batch.plan(tree, out, checkpoint="imvar/missing", n=VARIATIONS, shard=1)
    store = Store(made.folder.parent)
    started = time.perf_counter()
    write_results(store, made)
    yield f"{args.markers} markers, written without flushes", f"{time.perf_counter() - started:.1f} s", ""

    def checked() -> None:
        assert all(marker and store.row_lines(marker) is not None for _, marker in markers_of(store, made))

    made = batch.open_plan(out)
    for name, function, limit in (
        ("listed", store.done, "2 s"),
        ("read for status", lambda: batch_report(store, made), ""),
        ("all checked with their rows", checked, "60 s"),
        ("manifest written", lambda: write_manifest(store, made), ""),
    ):
        start, cpu = time.perf_counter(), time.process_time()
        function()
        yield name, f"{time.perf_counter() - start:.2f} s ({time.process_time() - cpu:.2f} s CPU)", limit
    for name, tail in (
        ("run again until done", ["run", tree, "-o", out, "--checkpoint", "imvar/missing", "--shard", "1"]),
        ("status by the command", ["status", out]),
    ):
        command = [sys.executable, "-m", "imvar", "batch", *map(str, tail)]
        start, cpu = time.perf_counter(), children_seconds()
        text = subprocess.run(command, check=True, env=environment(), capture_output=True, text=True).stdout
        assert text.startswith(f"{args.markers}/{args.markers} shards"), text
        yield name, f"{time.perf_counter() - start:.2f} s ({children_seconds() - cpu:.2f} s CPU)", ""


def write_results(store: Store, made: batch.Plan) -> None:
    """Write rows and markers as if the images of all shards had been made."""
    is_folder = made.settings.format == "files"
    for number in range(len(made)):
        items, rows = made.shard(number), []
        images = store.path("images" if is_folder else "shards", number, "" if is_folder else ".parquet")
        place = images.relative_to(store.folder).as_posix()
        for item in items:
            stem = Path(item["id"]).stem
            for k in range(made.settings.n):
                row = {"id": item["id"], "k": k, "seed": made.settings.seed_of(item["id"], k), "sha256": "0" * 64}
                name = f"{stem}-{k}.png"
                file = {"file": f"{place}/{name}"} if is_folder else {"file": place, "member": name}
                rows.append({**row, "flagged": False, "bad_concepts": [], **file})
        paths = [store.path("rows", number, ".jsonl"), store.path("done", number, ".json")]
        if number % GROUP == 0:
            for path in paths:
                path.parent.mkdir(parents=True)
        digest = sha256(rows_as_bytes(rows))
        marker = Marker(number, made.digest(number), digest, len(rows), 0, 0, len(rows) * IMAGE_BYTES)
        paths[0].write_bytes(rows_as_bytes(rows))
        paths[1].write_text(marker.json_text())


# Scale


def scale(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str, str]]:
    inputs, out = folder / "inputs", folder / "batch"
    write_inputs(inputs, args.items)
    for name, code in SCALE_SUITE.items():
        wall, cpu, peak, more = measured(code, inputs / "*.parquet", out)
        yield name, f"{wall:.1f} s ({cpu:.1f} s CPU), {peak:.0f} MB", ""
        if name == "planned":
            yield "its peak of memory beyond the imports'", f"{more:.0f} MB", "200 MB"
            made = batch.open_plan(out)
            write_results(Store(out), made)
    for name in "plan", "rows", "done", "manifest.jsonl":
        paths = [path for path in (out / name).rglob("*") if path.is_file()] or [out / name]
        sizes = [path.stat() for path in paths]
        size, blocks = sum(size.st_size for size in sizes), sum(512 * size.st_blocks for size in sizes)
        yield f"{name}, {len(paths)} files", f"{size / 1e9:.2f} GB, {blocks / 1e9:.2f} GB of the disk", ""
    days, terabytes = args.items * IMAGE_SECONDS / 86400, args.items * IMAGE_BYTES / 1e12
    yield "images, not made", f"{days:.1f} GPU-days, {terabytes:.2f} TB", ""


def write_inputs(folder: Path, items: int) -> None:
    """Write parquet files whose rows have keys, and no images."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    for first in range(0, items, IN_FILE):
        keys = [f"photo-{k:08d}.jpg" for k in range(first, min(first + IN_FILE, items))]
        columns = {"key": keys, "image": pyarrow.nulls(len(keys), pyarrow.binary())}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{first // IN_FILE:05d}.parquet")


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def machine() -> dict[str, Any]:
    """Return what the results depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit,
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": PIL.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--rounds", type=int, default=5, help="of overhead")
    parser.add_argument("--inputs", type=int, default=256, help="of overhead at 64 px; a sixteenth at 512 px")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--calls", type=int, default=8, help="of each worker")
    parser.add_argument("--sleep", type=float, default=1.0, help="seconds a call")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--markers", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=1_000_000, help="of scale")
    parser.add_argument("--folder", type=Path, help="where temporary files are; scale takes 1 kB for each item")
    args = parser.parse_args()
    print(json.dumps(machine()), end="\n\n")
    print("| | measured | limit |\n|---|---:|---:|")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for suite in args.suites:
            for row in globals()[suite](args, Path(folder)):
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
