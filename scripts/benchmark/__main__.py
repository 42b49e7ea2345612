"""Benchmark imvar against diffusers in one process, in interleaved rounds, with the same weights and inputs.

    python scripts/benchmark [CASE ...] [--checkpoint FOLDER] [--dtype bf16] [--threads 2] [--rounds 5]
    python scripts/benchmark profile [--dtype bf16]    # imvar's CPU time per kind of layer
    python scripts/benchmark regions [--dtype bf16]    # a step with regions against a plain one, both of imvar

CASE: unet vae clip safety pipeline load import scaling (default: all but scaling). Without --checkpoint, one of full
size with random weights is written to the work folder, 5.8 GB, and reused; `--tiny` writes a tiny one, to check that
everything runs. Each case first runs both libraries and compares their outputs, then times them alternately. The table
has median times, their ratio, the spread of the rounds, the peak memory above the baseline, and the largest difference
relative to the largest output. `--json` and `--markdown` save it.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import imvar

sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]

from benchmark.cases import CASES, DTYPES, Case, Libraries
from benchmark.memory import peak_memory, private_memory
from benchmark.profiling import profile_table
from benchmark.regions import regions_table
from tests.support.published_checkpoint import write_checkpoint

HEADER = ("case", "diffusers", "imvar", "ratio", "spread", "memory, diffusers", "memory, imvar", "difference")


@dataclass(frozen=True)
class Result:
    case: str
    diffusers: list[float]  # seconds per round
    imvar: list[float]
    diffusers_memory: int  # bytes
    imvar_memory: int
    difference: float  # largest difference relative to the largest output; NaN if the outputs are not tensors

    @property
    def ratio(self) -> float:
        return median(self.diffusers) / median(self.imvar)

    def cells(self) -> tuple[str, ...]:
        spread = max((max(times) - min(times)) / median(times) for times in (self.diffusers, self.imvar))
        return (
            self.case,
            format_seconds(median(self.diffusers)),
            format_seconds(median(self.imvar)),
            f"{self.ratio:.2f}",
            f"{100 * spread:.0f} %",
            f"{self.diffusers_memory / 1e9:.2f} GB",
            f"{self.imvar_memory / 1e9:.2f} GB",
            "" if self.difference != self.difference else f"{self.difference:.1e}",
        )


def format_seconds(time: float) -> str:
    return f"{time:.2f} s" if time >= 1 else f"{1000 * time:.1f} ms"


def time_call(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call: by CUDA events on CUDA, by the wall clock elsewhere."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    start_time = time.perf_counter()
    run()
    return time.perf_counter() - start_time


@torch.no_grad()
def measure(case: Case, args: argparse.Namespace) -> Result:
    (expected, diffusers_memory), (out, imvar_memory) = (
        private_memory(run) if case.keeps_memory else peak_memory(run, args.device)
        for run in (case.diffusers, case.imvar)
    )
    difference = float("nan")
    if isinstance(out, torch.Tensor):
        difference = float((out.double() - expected.double()).abs().max() / expected.double().abs().max())
    for _ in range(args.warm):
        case.diffusers()
        case.imvar()
    times: list[list[float]] = [[], []]
    for _ in range(args.rounds):
        for run, rounds in zip((case.diffusers, case.imvar), times, strict=True):
            rounds.append(case.seconds(run) if case.seconds else time_call(run, args.device))
    return Result(case.name, *times, diffusers_memory, imvar_memory, difference)


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Return the machine, versions and options that the results depend on."""
    import diffusers
    import transformers

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    model = (
        [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else [platform.processor()]
    )
    cuda = args.device.type == "cuda"
    freed = "kept" if args.keep_memory else "returned to the system"
    return {
        "date": date.today().isoformat(),
        "commit": commit,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "machine": torch.cuda.get_device_name() if cuda else model[0],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "freed memory": freed,
        "diffusers mode": "compiled, max-autotune" if args.reference == "compiled" else "eager",
        "imvar mode": f"compiled, {args.compile}" if args.compile else "eager",
    }


def markdown(results: list[Result], settings: dict[str, Any]) -> str:
    rows = [HEADER, ("---",) * len(HEADER), *(result.cells() for result in results)]
    footer = ", ".join(f"{name} {value}" for name, value in settings.items())
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", footer, ""])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", choices=[*CASES, "profile", "regions", []], help=" ".join(CASES))
    add("--checkpoint", type=Path, help="a folder in the published layout, with safetensors")
    add("--work", type=Path, default=Path("out/benchmark"), help="where a checkpoint is written without --checkpoint")
    add("--tiny", action="store_true", help="a tiny checkpoint, to check that everything runs")
    add("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    add("--dtype", choices=DTYPES, default=None, help="default: fp16 on CUDA, fp32 elsewhere")
    add("--threads", type=int, help="default: PyTorch's")
    add("--size", type=int, help="of the images in pixels (default: the checkpoint's, 512)")
    add("--batch", type=int, default=1, help="images per call")
    add("--steps", type=int, default=50, help="of the pipeline")
    add("--largest", type=int, default=4, help="batch of `scaling` (default: 4)")
    add(
        "--compile",
        nargs="?",
        const="max-autotune",
        metavar="MODE",
        help="compile imvar by pipe.compile(mode=MODE) (default: max-autotune)",
    )
    add(
        "--reference",
        choices=("eager", "compiled"),
        default="eager",
        help="diffusers eager, or compiled with fused QKV, channels_last and max-autotune",
    )
    add(
        "--keep-memory",
        action="store_true",
        help="call imvar.keep_freed_memory, as `imvar vary` does; affects both libraries",
    )
    add("--rounds", type=int, default=5)
    add("--warm", type=int, default=0, help="untimed rounds after the first comparison")
    add("--json", type=Path)
    add("--markdown", type=Path)
    args = parser.parse_args()
    args.dtype = args.dtype or ("fp16" if args.device.type == "cuda" else "fp32")
    args.cases = args.cases or [case for case in CASES if case != "scaling"]
    return args


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.keep_memory:
        imvar.keep_freed_memory()
    folder = args.checkpoint or args.work / ("tiny" if args.tiny else "full")
    if not folder.exists():
        print(f"writing {folder}", file=sys.stderr)
        write_checkpoint(folder, tiny=args.tiny, endings=(".safetensors",))
    libraries, results, settings = Libraries(folder, args), [], environment(args)
    if args.cases in (["profile"], ["regions"]):
        timed = partial(time_call, device=args.device)
        print(profile_table(libraries) if args.cases == ["profile"] else regions_table(libraries, timed))
        print(", ".join(f"{name} {value}" for name, value in settings.items()))
        return
    for name in args.cases:
        for case in CASES[name](libraries):
            results.append(measure(case, args))
            print("  ".join(f"{cell:>18}" for cell in results[-1].cells()), file=sys.stderr, flush=True)
        libraries.forget()
    print(markdown(results, settings))
    if args.json:
        args.json.write_text(
            json.dumps({"environment": settings, "results": [asdict(result) for result in results]}, indent=2)
        )
    if args.markdown:
        args.markdown.write_text(markdown(results, settings), encoding="utf-8")


if __name__ == "__main__":
    main()
