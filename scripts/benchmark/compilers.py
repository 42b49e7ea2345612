"""torch.compile and AOTInductor beside eager: a guided step and a decoded image, of diffusers and of imvar."""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import imvar
from benchmark.cases import STEP, Libraries, guided, latents_to_decode, predict_noise, step_inputs
from benchmark.children import in_child
from benchmark.memory import PeakOfPrivateMemory, peak_memory, status
from benchmark.tables import format_gigabytes, format_seconds, markdown_table, reported
from benchmark.timing import ratio_with_range, rms_error, time_call, time_in_turn
from imvar.errors import first_line
from imvar.pipeline.image_variation import decode_with
from imvar.runtime.compiled import Compiler
from imvar.runtime.precompute import PrecomputedUNet, Runner

HEADER = (
    *("case", "library", "dtype", "compiler", "compiling", "memory, compiling"),
    *("eager", "compiled", "eager / compiled", "memory, eager", "compiled", "rms error beside eager"),
)


class Job(nn.Module):
    """A function of tensors, as a module with the model whose weights it reads."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def unet_job(libraries: Libraries, library: str, runner: Runner) -> tuple[Job, tuple[Tensor, ...]]:
    """Return a guided step; that of imvar with what is precomputed before the loop."""
    reference, own = libraries.component("unet")
    x, times, context = step_inputs(libraries, libraries.args.batch, libraries.size)
    if library == "diffusers":
        predict = runner(predict_noise, reference)
        return Job(reference, lambda *inputs: guided(predict(*inputs))), (torch.cat([x, x]), times[STEP], context)
    prepared = PrecomputedUNet(own, times, context, runner)
    return Job(own, lambda x: guided(prepared(x, STEP))), (x,)


def vae_job(libraries: Libraries, library: str, runner: Runner) -> tuple[Job, tuple[Tensor, ...]]:
    model = libraries.component("vae")[library == "imvar"]
    return Job(model, runner(decode_with, model)), (latents_to_decode(libraries),)


def compiling_runner(library: str) -> Runner:
    """Return torch.compile as a runner; for imvar that of `pipe.compile()`."""
    if library == "imvar":
        return Compiler()
    return lambda function, model: torch.compile(partial(function, model), fullgraph=True, dynamic=False)


def compile_ahead_of_time(job: Job, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        package = f"{folder}/model.pt2"
        torch._inductor.aoti_compile_and_package(torch.export.export(job, inputs), package_path=package)
        return torch._inductor.aoti_load_package(package)


JOBS: dict[str, Callable[..., Any]] = {"unet": unet_job, "vae": vae_job}
COMPILERS = "torch.compile", "AOTInductor"


@torch.no_grad()
def compare(
    folder: Path, name: str, library: str, dtype: str, compiler: str, args: argparse.Namespace
) -> tuple[str, ...]:
    """Return the cells of a row. The memory while compiling is that of this process, without those it starts."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.keep_memory:
        imvar.keep_freed_memory()
    warnings.filterwarnings("error", "compile: cannot")  # imvar's, of a model that runs uncompiled
    build = partial(JOBS[name], Libraries(folder, args, dtype), library)
    job, inputs = build(partial)
    eager = partial(job, *inputs)
    expected, eager_memory = peak_memory(eager, args.device)
    before = status("RssAnon")
    start = time.perf_counter()
    with fresh_cache(), PeakOfPrivateMemory() as compiling:
        if compiler == "torch.compile":
            compiled, _ = build(compiling_runner(library))
        else:
            compiled = compile_ahead_of_time(job, inputs)
        compiled(*inputs)
    seconds = time.perf_counter() - start
    run = partial(compiled, *inputs)
    out, memory = peak_memory(run, args.device)
    times = time_in_turn((eager, run), args.rounds, partial(time_call, device=args.device))
    return (
        format_seconds(seconds),
        format_gigabytes(compiling.peak - before),
        *(format_seconds(median(taken)) for taken in times),
        ratio_with_range(*times),
        format_gigabytes(eager_memory),
        format_gigabytes(memory),
        f"{rms_error(out, expected):.1e}",
    )


def compilers_table(folder: Path, args: argparse.Namespace) -> str:
    rows: list[Sequence[str]] = []
    for name in JOBS:
        for dtype in args.dtype:
            for library in "diffusers", "imvar":
                for compiler in COMPILERS:
                    try:
                        cells = in_child(compare, folder, name, library, dtype, compiler, args)
                    except Exception as error:  # a compiler that fails is a result
                        cells = (f"{type(error).__name__}: {first_line(error)}", *[""] * (len(HEADER) - 5))
                    rows.append(reported((name, library, dtype, compiler, *cells)))
    return markdown_table(HEADER, rows)
