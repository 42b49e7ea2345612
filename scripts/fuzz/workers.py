"""Run fuzz cases in child processes, so that a crash or a hang is an outcome and not the end."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from fuzz.cases import file_groups, run_case, warm_up
from fuzz.corpus import write_corpus

TIMEOUT, STARTUP = 20.0, 60.0  # seconds per case, and for a worker before its first case


@dataclass
class Worker:
    process: Any
    cases: range  # not finished yet
    deadline: float  # by time.monotonic()
    started: bool = False


def work(pipe: Connection, seed: int, folder: Path, cases: range) -> None:
    """Run cases in a child process: send each number when it begins, then its outcome, and None at the end."""
    torch.set_num_threads(1)
    own_copy = shutil.copytree(folder / "base", folder / str(os.getpid()))
    groups = file_groups(own_copy)
    warm_up(own_copy)
    for number in cases:
        pipe.send((number, None))
        pipe.send((number, run_case(number, seed, own_copy, groups)))
    pipe.send(None)


def run(cases: int, seed: int, workers: int, folder: Path) -> Counter[str]:
    """Distribute the cases over child processes, print faults, and return the number of cases per outcome."""
    write_corpus(folder / "base")
    outcomes = Counter[str]()
    for number, outcome, corruption in results(cases, seed, workers, folder):
        outcomes[outcome.split()[0]] += 1
        if outcome not in ("loaded", "refused"):
            print(f"case {number}: {corruption}: {outcome}", flush=True)
        if sum(outcomes.values()) % 10_000 == 0:
            print(f"{sum(outcomes.values())} of {cases}", flush=True)
    return outcomes


def results(cases: int, seed: int, workers: int, folder: Path) -> Iterator[tuple[int, str, str]]:
    """Yield number, outcome and corruption of each case, as they finish; restart a worker that crashed or hung."""
    context = multiprocessing.get_context("spawn")
    running: dict[Any, Worker] = {}

    def start(numbers: range) -> None:
        receiver, sender = context.Pipe()
        process = context.Process(target=work, args=(sender, seed, folder, numbers), daemon=True)
        process.start()
        sender.close()
        running[receiver] = Worker(process, numbers, time.monotonic() + STARTUP)

    for first in range(workers):
        start(range(first, cases, workers))
    while running:
        for pipe in wait(list(running), timeout=1):
            worker = running[pipe]
            try:
                message = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                worker.process.join()
                del running[pipe]
                if not worker.started:
                    raise RuntimeError(f"a worker exited with code {worker.process.exitcode} before a case") from None
                yield worker.cases[0], f"CRASHED with exit code {worker.process.exitcode}", ""
                start(worker.cases[1:])
                continue
            if message is None:
                del running[pipe]
                continue
            number, result = message
            worker.deadline = time.monotonic() + TIMEOUT
            if result is None:
                worker.started, worker.cases = True, worker.cases[worker.cases.index(number) :]
            else:
                yield number, *result
        for worker in running.values():
            if time.monotonic() > worker.deadline:
                worker.process.kill()
