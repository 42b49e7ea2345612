"""Benchmark imvar against diffusers in one process, in interleaved rounds, with the same weights and inputs.

    python scripts/benchmark [CASE ...] [--checkpoint FOLDER] [--dtype fp32,bf16] [--threads 2] [--rounds 5] [--busy]
    python scripts/benchmark unet vae --rival openvino --dtype fp32,bf16    # diffusers, OpenVINO and imvar, in turn
    python scripts/benchmark unet --rival openvino --dtype int8             # quantized, beside diffusers in bfloat16
    python scripts/benchmark memory --dtype fp32,bf16     # of a process that loads the pipeline and makes one image
    python scripts/benchmark compilers --dtype fp32,bf16  # torch.compile and AOTInductor beside eager
    python scripts/benchmark profile [--dtype bf16]       # imvar's time per kind of layer, or of kernel on CUDA
    python scripts/benchmark kernels [--dtype fp16]       # candidates for the layers of the published model, in turn
    python scripts/benchmark precision                    # imvar's error and speed by dtype and level of compilation
    python scripts/benchmark regions [--dtype bf16]       # a step with regions against a plain one, both of imvar

CASE: unet vae clip safety pipeline load import scaling (default: all but scaling). Without --checkpoint, one of full
size with random weights is written to the work folder, 5.8 GB, and reused; `--tiny` writes a tiny one, to check that
everything runs. Each case first runs both libraries and compares their outputs, then times them alternately. The table
has median times, their ratio, the spread of the rounds, the peak memory above the baseline, and the largest difference
relative to the largest output. `--busy` adds rows of rounds beside one busy process. `--markdown` saves the table,
`--json` its numbers.

With a rival (pip install "imvar[benchmark]"), the table has the ratio of the medians to imvar's, with the lowest and
the highest ratio of a round, and the error of each library: the root mean square of the difference from diffusers in
float32, relative to that of its output. Converted models are kept in the work folder. `--keep-memory` is for all.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]

import imvar
from benchmark.cases import CASES, DTYPES, EAGER, LEVELS, Case, Libraries
from benchmark.compilers import compilers_table
from benchmark.gpu_kernels import kernels_table
from benchmark.gpu_profile import gpu_profile_table
from benchmark.machine import environment
from benchmark.memory import peak_memory, private_memory
from benchmark.one_image import memory_table
from benchmark.openvino_models import PRECISIONS
from benchmark.precision import precision_table
from benchmark.profiling import profile_table
from benchmark.regions import regions_table
from benchmark.rivals import CASES_OF_RIVALS, INT8, rivals_table
from benchmark.tables import format_gigabytes, format_seconds, markdown_table, reported, settings_line
from benchmark.timing import largest_difference, spread, time_call, time_in_turn
from tests.support.published_checkpoint import write_checkpoint

HEADER = ("case", "dtype", "diffusers", "imvar", "ratio", "spread", "memory, diffusers", "memory, imvar", "difference")


@dataclass(frozen=True)
class Result:
    case: str
    dtype: str
    diffusers: list[float]  # seconds per round
    imvar: list[float]
    diffusers_memory: int  # bytes
    imvar_memory: int
    difference: float  # largest difference relative to the largest output; NaN if the outputs are not tensors

    @property
    def ratio(self) -> float:
        return median(self.diffusers) / median(self.imvar)

    def cells(self) -> tuple[str, ...]:
        return (
            self.case,
            self.dtype,
            format_seconds(median(self.diffusers)),
            format_seconds(median(self.imvar)),
            f"{self.ratio:.2f}",
            f"{100 * max(spread(self.diffusers), spread(self.imvar)):.0f} %",
            format_gigabytes(self.diffusers_memory),
            format_gigabytes(self.imvar_memory),
            "" if self.difference != self.difference else f"{self.difference:.1e}",
        )


@torch.no_grad()
def measure(case: Case, dtype: str, args: argparse.Namespace) -> Iterator[Result]:
    """Yield a result, and with `--busy` one beside a busy process."""
    (expected, diffusers_memory), (out, imvar_memory) = (
        private_memory(run) if case.keeps_memory else peak_memory(run, args.device)
        for run in (case.diffusers, case.imvar)
    )
    difference = largest_difference(out, expected)  # before a compiled function writes over its outputs
    seconds = case.seconds or partial(time_call, device=args.device)
    for _ in range(args.warm):
        case.diffusers()
        case.imvar()
    for busy in (False, True) if args.busy else (False,):
        times = time_in_turn((case.diffusers, case.imvar), args.rounds, seconds, busy)
        name = f"{case.name}, beside a busy process" if busy else case.name
        yield Result(name, dtype, *times, diffusers_memory, imvar_memory, difference)


def compare_libraries(folder: Path, args: argparse.Namespace) -> Iterator[Result]:
    """Yield the results of all cases, one dtype after the other. Raises SystemExit at the end if any failed."""
    failed = []
    for dtype in args.dtype:
        libraries = Libraries(folder, args, dtype)
        for name in args.cases:
            if name == "import" and dtype != args.dtype[0]:
                continue  # it does not depend on the dtype
            try:
                for case in CASES[name](libraries):
                    for result in measure(case, dtype, args):
                        reported(result.cells())
                        yield result
            except Exception:  # the other cases are still measured
                traceback.print_exc()
                failed.append(f"{name} in {dtype}")
            libraries.forget()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def tables_by_dtype(table: Callable[[Libraries], str], folder: Path, args: argparse.Namespace) -> str:
    return "\n\n".join(f"{dtype}:\n\n{table(Libraries(folder, args, dtype))}" for dtype in args.dtype)


def profile_tables(folder: Path, args: argparse.Namespace) -> str:
    return tables_by_dtype(gpu_profile_table if args.device.type == "cuda" else profile_table, folder, args)


def regions_tables(folder: Path, args: argparse.Namespace) -> str:
    return tables_by_dtype(partial(regions_table, seconds=partial(time_call, device=args.device)), folder, args)


def kernels_tables(_: Path, args: argparse.Namespace) -> str:
    return "\n\n".join(f"{dtype}:\n\n{kernels_table(DTYPES[dtype], args)}" for dtype in args.dtype)


TABLES: dict[str, Callable[[Path, argparse.Namespace], str]] = {  # in place of cases
    "memory": memory_table,
    "compilers": compilers_table,
    "profile": profile_tables,
    "kernels": kernels_tables,
    "precision": precision_table,
    "regions": regions_tables,
}


def dtype_list(text: str) -> list[str]:
    """Parse names of dtypes with commas between them."""
    names = text.split(",")
    known = *DTYPES, INT8
    if wrong := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"invalid choice: {wrong[0]!r} (choose from {', '.join(known)})")
    return names


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", choices=[*CASES, *TABLES, []], help=" ".join([*CASES, *TABLES]))
    add("--checkpoint", type=Path, help="a folder in the published layout, with safetensors")
    add("--work", type=Path, default=Path("out/benchmark"), help="where a checkpoint is written without --checkpoint")
    add("--tiny", action="store_true", help="a tiny checkpoint, to check that everything runs")
    add("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    add(
        "--dtype",
        type=dtype_list,
        help=f"{', '.join(DTYPES)}, int8 with a rival, or several with commas; default: fp16 on CUDA, else fp32",
    )
    add("--threads", type=int, help="default: PyTorch's")
    add("--size", type=int, help="of the images in pixels (default: the checkpoint's, 512)")
    add("--batch", type=int, default=1, help="images per call")
    add("--steps", type=int, default=50, help="of the pipeline")
    add("--largest", type=int, default=4, help="batch of `scaling` (default: 4)")
    add("--compile", choices=(EAGER, *LEVELS), default=EAGER, help="how imvar is run (default: eager)")
    add(
        "--reference",
        choices=(EAGER, "default", "reduce-overhead", "max-autotune"),
        default=EAGER,
        help="how diffusers is run: by default eager, or with fused QKV, in channels_last, compiled in this mode",
    )
    add(
        "--keep-memory",
        action="store_true",
        help="call imvar.keep_freed_memory, as `imvar vary` does; affects both libraries",
    )
    add("--rival", choices=("openvino",), default="", help="a third library, for the cases unet and vae on a CPU")
    add("--busy", action="store_true", help="add rows of rounds beside one busy process")
    add("--rounds", type=int, default=5)
    add("--warm", type=int, default=0, help="untimed rounds after the first comparison")
    add("--json", type=Path)
    add("--markdown", type=Path)
    args = parser.parse_args()
    args.dtype = args.dtype or ["fp16" if args.device.type == "cuda" else "fp32"]
    if args.rival:
        args.cases = args.cases or list(CASES_OF_RIVALS)
        if (
            not set(args.cases) <= set(CASES_OF_RIVALS)
            or args.device.type != "cpu"
            or not set(args.dtype) <= {*PRECISIONS}
        ):
            parser.error("--rival: expected the cases unet and vae on a CPU in fp32, bf16 or int8")
        args.packages = ["openvino", "nncf"] if INT8 in args.dtype else ["openvino"]
        if missing := [name for name in args.packages if find_spec(name) is None]:
            parser.error(f'--rival: expected the package {missing[0]}; run pip install "imvar[benchmark]"')
    if INT8 in args.dtype and (not args.rival or args.cases != ["unet"]):
        parser.error("--dtype int8: expected the case unet with --rival openvino")
    if args.json and (args.rival or set(args.cases) & {*TABLES}):
        parser.error("--json: expected cases without a rival")
    if len(args.cases) > 1 and set(args.cases) & {*TABLES}:
        parser.error(f"CASE: expected one of {', '.join(TABLES)} alone, got {' '.join(args.cases)}")
    args.cases = args.cases or [case for case in CASES if case != "scaling"]
    return args


def save(args: argparse.Namespace, settings: dict[str, Any], table: str, results: list[Result]) -> str:
    """Return the table with the settings, after writing it and the results to the files that were asked for."""
    text = f"{table}\n\n{settings_line(settings)}\n"
    if args.json:
        numbers = {"environment": settings, "results": [asdict(result) for result in results]}
        args.json.write_text(json.dumps(numbers, indent=2))
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    return text


def main() -> None:
    warnings.filterwarnings("error", "compile: cannot")  # imvar's, of a model that would be measured uncompiled
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.keep_memory:
        imvar.keep_freed_memory()
    folder = args.checkpoint or args.work / ("tiny" if args.tiny else "full")
    if not folder.exists():
        print(f"writing {folder}", file=sys.stderr)
        unfinished = folder.with_suffix(".part")
        write_checkpoint(unfinished, tiny=args.tiny, endings=(".safetensors",), device=args.device)
        unfinished.rename(folder)
    settings, table = environment(args, *(args.packages if args.rival else [])), markdown_table(HEADER, [])
    results: list[Result] = []
    if args.rival:
        table = rivals_table(folder, args)
    elif args.cases[0] in TABLES:
        table = TABLES[args.cases[0]](folder, args)
    else:
        for result in compare_libraries(folder, args):  # saved one by one, in case that a later one takes too long
            results.append(result)
            table = markdown_table(HEADER, (result.cells() for result in results))
            save(args, settings, table, results)
    print(save(args, settings, table, results))


if __name__ == "__main__":
    main()
