"""Measure how much longer `imvar vary` takes beside a busy process.

    python scripts/benchmark_busy.py [--rounds 5] [-n 4]

One round runs the command idle and beside one process that computes without a pause, with the settings of the command
(passive threads, one for imvar-emoji) and with PyTorch's own (OMP_WAIT_POLICY=active, a thread for each core). The
table has medians. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from statistics import median

import torch
from benchmark.busy import busy_process
from benchmark.machine import machine
from benchmark.tables import markdown_table, settings_line

SETTINGS = {
    "as imvar sets it": {},
    "as PyTorch sets it": {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": str(os.cpu_count())},
}


def seconds_of(n: int, variables: dict[str, str]) -> float:
    """Return how long it takes to make n variations of a drawing."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    with tempfile.TemporaryDirectory() as folder:
        vary = ["-m", "imvar", "vary", "--checkpoint", "imvar-emoji", "-n", str(n), "-o", folder, "--quiet"]
        started = time.perf_counter()
        subprocess.run([sys.executable, *vary], env=inherited | variables, check=True)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-n", type=int, default=4, help="variations of each bundled drawing")
    args = parser.parse_args()
    times: dict[tuple[str, bool], list[float]] = {(name, busy): [] for name in SETTINGS for busy in (False, True)}
    for _ in range(args.rounds):
        for (name, busy), seconds in times.items():
            with busy_process() if busy else nullcontext():
                seconds.append(seconds_of(args.n, SETTINGS[name]))
    rows = []
    for name in SETTINGS:
        idle, beside = median(times[name, False]), median(times[name, True])
        rows.append((name, f"{idle:.1f}", f"{beside:.1f}", f"{beside / idle:.2f}"))
    print(markdown_table(("threads", "idle, s", "beside a busy process, s", "ratio"), rows))
    settings = machine(torch.device("cpu")) | {"rounds": args.rounds, "variations of each drawing": args.n}
    print(f"\n{settings_line(settings)}")


if __name__ == "__main__":
    main()
