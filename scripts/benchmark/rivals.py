"""A guided step and a decoded image by diffusers, OpenVINO and imvar, in turn in one process, and their errors."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmark.cases import CASES, STEP, Libraries, guided, latents_to_decode, predict_noise, step_inputs
from benchmark.children import in_child
from benchmark.openvino_models import OpenVINOModel, converted, quantized
from benchmark.tables import format_seconds, markdown_table, reported
from benchmark.timing import ratio_with_range, rms_error, spread, time_call, time_in_turn
from imvar.pipeline.image_variation import decode_with
from imvar.runtime import int8

CASES_OF_RIVALS = "unet", "vae"
INT8 = "int8"  # as a dtype: diffusers and what is not quantized are in bfloat16
CALIBRATION_STEPS = range(0, 50, 7)  # whose inputs OpenVINO's model is quantized for, with other latents in each
HEADER = (
    *("case", "dtype", "diffusers", "OpenVINO", "imvar", "diffusers / imvar", "OpenVINO / imvar", "spread"),
    *("rms error, diffusers", "OpenVINO", "imvar", "OpenVINO computes in"),
)


def inputs_of(libraries: Libraries, name: str) -> tuple[Tensor, ...]:
    """Return the inputs of diffusers' model: of the UNet both halves of guidance in one batch."""
    if name == "vae":
        return (latents_to_decode(libraries),)
    x, times, context = step_inputs(libraries, libraries.args.batch, libraries.size)
    return torch.cat([x, x]), times[STEP], context


FUNCTIONS = {"unet": predict_noise, "vae": decode_with}


@torch.no_grad()
def converted_file(folder: Path, args: argparse.Namespace, name: str) -> Path:
    """Return the file of diffusers' model of the case `name`, converted to OpenVINO."""
    exact = Libraries(folder, args, "fp32")

    def load() -> torch.nn.Module:
        return exact.component(name)[0]

    return converted(args.work / "openvino", FUNCTIONS[name], load, folder / name, inputs_of(exact, name))


@torch.no_grad()
def quantized_file(folder: Path, args: argparse.Namespace) -> Path:
    """Return the file of diffusers' UNet, converted to OpenVINO and quantized."""
    exact = Libraries(folder, args, "fp32")
    latents, times, context = step_inputs(exact, args.batch, exact.size)
    noise = [exact.noise(*latents.shape, seed=2 + step) for step in CALIBRATION_STEPS]
    samples = [(torch.cat([x, x]), times[step], context) for x, step in zip(noise, CALIBRATION_STEPS, strict=True)]
    return quantized(in_child(converted_file, folder, args, "unet"), samples)


def openvino_case(model: OpenVINOModel, exact: Libraries, name: str) -> Callable[[], Tensor]:
    """Return the job of the case `name`, run by OpenVINO on float32 inputs."""
    if name == "vae":
        (z,) = inputs_of(exact, name)
        return lambda: model(z)
    x, times, context = step_inputs(exact, exact.args.batch, exact.size)
    return lambda: guided(model(torch.cat([x, x]), times[STEP], context))


@torch.no_grad()
def rivals_rows(folder: Path, args: argparse.Namespace, name: str, dtype: str) -> Iterator[Sequence[str]]:
    """Yield a row of the case `name`, and with `--busy` one beside a busy process.

    The errors are those beside diffusers in float32, from the same inputs, whose values are those of `dtype`. The model
    is converted and quantized in processes of their own, for its memory.
    """
    dtype_of_weights = "bf16" if dtype == INT8 else dtype
    exact = Libraries(folder, args, "fp32", rounded=dtype_of_weights)
    expected = next(CASES[name](exact)).diffusers()
    file = in_child(quantized_file, folder, args) if dtype == INT8 else in_child(converted_file, folder, args, name)
    model = OpenVINOModel(file, dtype, torch.get_num_threads())
    run_openvino = openvino_case(model, exact, name)
    exact.forget()
    libraries = Libraries(folder, args, dtype_of_weights)
    if dtype == INT8:
        int8.enable(libraries.component(name)[1])
    case = next(CASES[name](libraries))
    runs = case.diffusers, run_openvino, case.imvar
    errors = [f"{rms_error(run(), expected):.1e}" for run in runs]
    for _ in range(args.warm):
        for run in runs:
            run()
    for busy in (False, True) if args.busy else (False,):
        times = time_in_turn(runs, args.rounds, partial(time_call, device=args.device), busy)
        *rivals, own = times
        yield (
            f"{case.name}, beside a busy process" if busy else case.name,
            dtype,
            *(format_seconds(median(taken)) for taken in times),
            *(ratio_with_range(taken, own) for taken in rivals),
            f"{100 * max(map(spread, times)):.0f} %",
            *errors,
            f"{INT8}, {model.precision}" if dtype == INT8 else model.precision,
        )


def rivals_table(folder: Path, args: argparse.Namespace) -> str:
    rows = (rivals_rows(folder, args, name, dtype) for name in args.cases for dtype in args.dtype)
    return markdown_table(HEADER, map(reported, chain.from_iterable(rows)))
