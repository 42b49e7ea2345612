"""Time imvar beside diffusers: in one process, in turn, with the same weights and the same inputs.

    python scripts/benchmark [CASE ...] [--checkpoint FOLDER] [--dtype bf16] [--threads 2] [--rounds 5]
    python scripts/benchmark profile [--dtype bf16]    # where imvar's time goes on a CPU, against the floor

CASE: unet vae clip safety pipeline load import scaling (default: all but scaling). Without --checkpoint one of full
size with random weights is made, 5.8 GB, in the work folder, and found there again; `--tiny` makes a tiny one, to see
whether everything runs. Every case first runs both sides, compares their answers, and then times them in turn.
The table has medians, how far the rounds spread, the ratio of the medians, the most memory beyond what was there
before, and the largest difference of the answers beside the largest answer. `--json` and `--markdown` write it down.
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
from pathlib import Path
from statistics import median
from typing import Any

import torch

import imvar

sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]

from benchmark.cases import CASES, DTYPES, Case, Sides
from benchmark.memory import peak_of, private_of
from benchmark.profiling import profile
from tests.support.published_checkpoint import write_checkpoint

HEADER = ("case", "diffusers", "imvar", "ratio", "spread", "memory, diffusers", "memory, imvar", "difference")


@dataclass(frozen=True)
class Result:
    case: str
    theirs: list[float]  # seconds
    ours: list[float]
    their_memory: int  # bytes
    our_memory: int
    difference: float  # the largest, of the largest answer; NaN where the answers are no tensors

    @property
    def ratio(self) -> float:
        return median(self.theirs) / median(self.ours)

    def cells(self) -> tuple[str, ...]:
        spread = max((max(times) - min(times)) / median(times) for times in (self.theirs, self.ours))
        return (
            self.case,
            seconds(median(self.theirs)),
            seconds(median(self.ours)),
            f"{self.ratio:.2f}",
            f"{100 * spread:.0f} %",
            f"{self.their_memory / 1e9:.2f} GB",
            f"{self.our_memory / 1e9:.2f} GB",
            "" if self.difference != self.difference else f"{self.difference:.1e}",
        )


def seconds(time: float) -> str:
    return f"{time:.2f} s" if time >= 1 else f"{1000 * time:.1f} ms"


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds: by the device's own clock on CUDA, by the wall elsewhere."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


@torch.no_grad()
def measure(case: Case, args: argparse.Namespace) -> Result:
    (theirs, their_memory), (ours, our_memory) = (
        private_of(run) if case.makes else peak_of(run, args.device) for run in (case.theirs, case.ours)
    )
    difference = float("nan")
    if isinstance(ours, torch.Tensor):
        difference = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
    for _ in range(args.warm):
        case.theirs()
        case.ours()
    times: list[list[float]] = [[], []]
    for _ in range(args.rounds):
        for run, found in zip((case.theirs, case.ours), times, strict=True):
            found.append(case.seconds(run) if case.seconds else timed(run, args.device))
    return Result(case.name, *times, their_memory, our_memory, difference)


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures hold for."""
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
    freed = "kept" if args.keep_memory else "handed back"
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
        "rival": "compiled, max-autotune" if args.rival == "compiled" else "eager",
        "imvar": f"compiled, {args.compile}" if args.compile else "eager",
    }


def markdown(results: list[Result], facts: dict[str, Any]) -> str:
    rows = [HEADER, ("---",) * len(HEADER), *(result.cells() for result in results)]
    said = ", ".join(f"{name} {value}" for name, value in facts.items())
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", said, ""])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", choices=[*CASES, "profile", []], help=" ".join(CASES))
    add("--checkpoint", type=Path, help="a folder in the published layout, with safetensors")
    add("--work", type=Path, default=Path("out/benchmark"), help="where one is made, if none is named")
    add("--tiny", action="store_true", help="a tiny checkpoint: to see whether everything runs")
    add("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    add("--dtype", choices=DTYPES, default=None, help="default: fp16 on CUDA, fp32 elsewhere")
    add("--threads", type=int, help="default: as many as PyTorch takes")
    add("--size", type=int, help="of the pictures in pixels (default: the checkpoint's, 512)")
    add("--batch", type=int, default=1, help="pictures at a time")
    add("--steps", type=int, default=50, help="of the pipeline")
    add("--largest", type=int, default=4, help="batch of `scaling` (default: 4)")
    add(
        "--compile",
        nargs="?",
        const="max-autotune",
        metavar="MODE",
        help="imvar as pipe.compile(mode=MODE) makes it (default: max-autotune)",
    )
    add(
        "--rival",
        choices=("eager", "compiled"),
        default="eager",
        help="compiled: as fast as it goes, with fused QKV, channels_last and max-autotune",
    )
    add("--keep-memory", action="store_true", help="for both, imvar.keep_freed_memory, which `imvar vary` calls")
    add("--rounds", type=int, default=5)
    add("--warm", type=int, default=0, help="rounds before those that count, after the first comparison")
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
        print(f"making {folder}", file=sys.stderr)
        write_checkpoint(folder, tiny=args.tiny, endings=(".safetensors",))
    sides, results, facts = Sides(folder, args), [], about(args)
    if args.cases == ["profile"]:
        print(profile(sides))
        print(", ".join(f"{name} {value}" for name, value in facts.items()))
        return
    for name in args.cases:
        for case in CASES[name](sides):
            results.append(measure(case, args))
            print("  ".join(f"{cell:>18}" for cell in results[-1].cells()), file=sys.stderr, flush=True)
        sides.forget()
    print(markdown(results, facts))
    if args.json:
        args.json.write_text(json.dumps({"about": facts, "results": [asdict(result) for result in results]}, indent=2))
    if args.markdown:
        args.markdown.write_text(markdown(results, facts), encoding="utf-8")


if __name__ == "__main__":
    main()
