"""Profile of a guided step and of a decoded image on CUDA: time per kind of kernel, launches, and idle time.

The whole time is that without the profiler, which slows the launches but not the kernels.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmark.cases import Libraries, guided_step, vae
from benchmark.tables import markdown_table, reported
from benchmark.timing import time_call

HEADER = ("milliseconds", "share", "kernels")
KINDS = {  # by the first pattern that is in a kernel's name
    "fused elementwise": r"triton_poi",  # Inductor's, named after all that they fuse
    "fused norms": r"triton_(red|per)",
    "attention": r"flash|fmha|attention|sdpa|softmax",
    "layout of convolutions": r"nchwtonhwc|nhwctonchw|tensortransform",
    "convolution": r"conv|fprop|implicit|winograd|wgrad|dgrad",
    "matrix products": r"gemm|nvjet|cutlass|cublas|splitk|triton_\w*mm",
    "norms": r"norm|moments|welford|fusedparams",
    "copies": r"copy|memcpy|memset|catarray|_cat",
    "elementwise": r"elementwise|vectorized|silu|gelu",
}
N_NAMES = 12  # kernels listed by name
SYNCHRONIZATIONS = "Context Sync", "Stream Sync", "Event Sync", "Stream Wait Event"  # events in which nothing runs


@dataclass(frozen=True)
class Kernel:
    """A kernel or a copy on the GPU, with its start and end in microseconds."""

    name: str
    start: float
    end: float

    @property
    def kind(self) -> str:
        name = self.name.lower()
        return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "others")


def busy_time(kernels: Iterable[Kernel]) -> float:
    """Return the microseconds in which at least one kernel runs."""
    total, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        total += max(kernel.end - max(kernel.start, until), 0.0)
        until = max(until, kernel.end)
    return total


def grouped(kernels: Iterable[Kernel], key: Callable[[Kernel], str]) -> dict[str, list[Kernel]]:
    """Return the kernels by key, that with the most time first."""
    groups: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        groups[key(kernel)].append(kernel)
    return dict(sorted(groups.items(), key=lambda item: -seconds_of(item[1])))


def seconds_of(kernels: Iterable[Kernel]) -> float:
    return sum(kernel.end - kernel.start for kernel in kernels) / 1e6


def profile_rows(kernels: Sequence[Kernel], runs: int, whole: float) -> list[tuple[str, ...]]:
    """Return the cells of the table of kinds: time and kernels of one of `runs`, which take `whole` seconds each."""
    rows = [(kind, seconds_of(group) / runs, len(group)) for kind, group in grouped(kernels, lambda k: k.kind).items()]
    idle = max(whole - busy_time(kernels) / 1e6 / runs, 0.0)
    rows += [("idle", idle, 0), ("all", whole, len(kernels))]
    return [
        (name, f"{1000 * seconds:.3f}", f"{100 * seconds / whole:.1f} %", f"{count / runs:g}")
        for name, seconds, count in rows
    ]


def longest_rows(kernels: Sequence[Kernel], runs: int) -> list[tuple[str, ...]]:
    """Return the cells of the table of the kernels that take the most time, by name."""
    total = seconds_of(kernels)
    return [
        (
            f"`{name[:100].replace('|', '/')}`",
            f"{1000 * seconds_of(group) / runs:.3f}",
            f"{100 * seconds_of(group) / total:.1f} %",
            f"{len(group) / runs:g}",
        )
        for name, group in list(grouped(kernels, lambda k: k.name).items())[:N_NAMES]
    ]


def kernels_of(run: Callable[[], Any], runs: int) -> list[Kernel]:
    """Return the kernels of `runs` calls."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        repeat(run, runs)
        torch.cuda.synchronize()
    return kernels_in(profiled.events() or ())


def kernels_in(events: Iterable[Any]) -> list[Kernel]:
    """Return the events on the GPU, without annotations, which span kernels, and without synchronizations."""
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation and event.name not in SYNCHRONIZATIONS
    ]


def repeat(run: Callable[[], Any], runs: int) -> None:
    for _ in range(runs):
        run()


@torch.no_grad()
def gpu_profile_table(libraries: Libraries) -> str:
    """Return two tables for each job: the kinds of kernels, and the kernels that take the most time."""
    tables = []
    for case in (guided_step(libraries, libraries.args.batch, libraries.size), next(iter(vae(libraries)))):
        for library, run in (("diffusers", case.diffusers), ("imvar", case.imvar)):
            repeat(run, 3)  # compiles, records and allocates memory
            runs = libraries.args.rounds
            whole = time_call(partial(repeat, run, runs), libraries.device) / runs
            kernels = kernels_of(run, runs)
            rows = profile_rows(kernels, runs, whole)
            tables.append(markdown_table((f"{case.name}, {library}: kind", *HEADER), map(reported, rows)))
            rows = longest_rows(kernels, runs)
            tables.append(markdown_table((f"{case.name}, {library}: kernel", *HEADER), map(reported, rows)))
    return "\n\n".join(tables)
