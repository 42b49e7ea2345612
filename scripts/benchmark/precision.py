"""Error of imvar beside float64 at each level of speed, its time, and whether two calls are equal bit by bit.

A guided step and a decoded image, with random weights; those of the checkpoint in float64 are exact. Inputs have values
of bfloat16, so that their rounding is in no error; that of the weights is. The first rows are diffusers' in each dtype.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmark.cases import EAGER, LEVELS, Libraries, guided_step, vae
from benchmark.machine import setting
from benchmark.tables import format_seconds, markdown_table, reported
from benchmark.timing import rms_error, time_call
from imvar.errors import first_line

HEADER = (
    *("case", "library", "dtype", "level", "TF32 in matrix products", "in convolutions", "cudnn.benchmark"),
    *("rms error beside fp64", "two calls equal", "time"),
)


@dataclass(frozen=True)
class Setting:
    """A dtype, a level of compilation, and the switches of PyTorch on CUDA."""

    dtype: str
    level: str = EAGER
    matmul_tf32: bool = False
    conv_tf32: bool = False
    benchmark: bool = False
    library: str = "imvar"

    def cells(self) -> tuple[str, ...]:
        tf32 = (self.matmul_tf32, self.conv_tf32) if self.dtype == "fp32" else ("", "")
        return self.library, self.dtype, self.level, *map(str, tf32), str(self.benchmark)


def settings(args: argparse.Namespace) -> list[Setting]:
    """Return the settings, up to the level of --compile; elsewhere than on CUDA without those of CUDA."""
    levels = [EAGER, *LEVELS]
    allowed = levels[: max(levels.index(args.compile), 1) + 1]
    on_cuda = args.device.type == "cuda"
    dtypes = ("fp32", "bf16", "fp16") if on_cuda else ("fp32", "bf16")
    plain = [Setting(dtype, library=library) for library in ("diffusers", "imvar") for dtype in dtypes]
    if not on_cuda:
        return [*plain, *(Setting("fp32", level) for level in allowed[1:])]
    return [
        *plain,
        Setting("fp32", conv_tf32=True),  # PyTorch's default
        Setting("fp32", matmul_tf32=True, conv_tf32=True),
        Setting("fp16", benchmark=True),
        *(Setting("fp16", level) for level in allowed[1:]),
        *(Setting("fp16", level, benchmark=True) for level in allowed[1:2]),
    ]


def jobs_of(libraries: Libraries, chosen: Setting) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield the name and the call of a guided step, and of a decoded image."""
    for case in (guided_step(libraries, libraries.args.batch, libraries.size), next(iter(vae(libraries)))):
        yield case.name, case.diffusers if chosen.library == "diffusers" else case.imvar


def outputs_of(libraries: Libraries) -> list[Tensor]:
    return [run().clone() for _, run in jobs_of(libraries, Setting("fp64"))]


def rows_of(chosen: Setting, folder: Path, args: argparse.Namespace, exact: list[Tensor]) -> Iterator[Sequence[str]]:
    """Yield a row for each job."""
    args = argparse.Namespace(**vars(args) | {"compile": chosen.level, "reference": EAGER})
    libraries = Libraries(folder, args, chosen.dtype, rounded="bf16")
    with ExitStack() as stack:
        for module, name, value in (
            (torch.backends.cuda.matmul, "allow_tf32", chosen.matmul_tf32),
            (torch.backends.cudnn, "allow_tf32", chosen.conv_tf32),
            (torch.backends.cudnn, "benchmark", chosen.benchmark),
        ):
            stack.enter_context(setting(module, name, value))
        for (name, run), expected in zip(jobs_of(libraries, chosen), exact, strict=True):
            run()  # compiles, chooses kernels and allocates memory
            first, second = run().clone(), run().clone()
            seconds = median(time_call(run, args.device) for _ in range(args.rounds))
            equal = "yes" if torch.equal(first, second) else "no"
            yield name, *chosen.cells(), f"{rms_error(first, expected):.1e}", equal, format_seconds(seconds)
    libraries.forget()


@torch.no_grad()
def precision_table(folder: Path, args: argparse.Namespace) -> str:
    plain = argparse.Namespace(**vars(args) | {"compile": EAGER, "reference": EAGER})
    exact = outputs_of(Libraries(folder, plain, "fp64", rounded="bf16"))
    gc.collect()
    rows: list[Sequence[str]] = []
    for chosen in settings(args):
        try:
            rows.extend(map(reported, rows_of(chosen, folder, args, exact)))
        except Exception as error:  # a setting that fails is a result
            reason = f"{type(error).__name__}: {first_line(error)}"
            rows.append(reported(("", *chosen.cells(), reason, "", "")))
    return markdown_table(HEADER, rows)
