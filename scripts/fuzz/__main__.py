"""Spoil tiny checkpoints in a seeded way and load them: each loads whole, or raises CheckpointError, and soon.

    python scripts/fuzz/__main__.py [--cases 100000] [--seed 0] [--workers 2] [--case N]

A case spoils one file of one part, by its meaning (settings, headers, indexes, pickles) or by its bytes, or puts
something else in its place. Cases run in child processes, so that one that crashes or hangs is told apart. What fails
is printed with its number, and `--case N` runs that one alone and shows the whole error.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]

from fuzz.corpus import LOADERS, make
from fuzz.corruptions import spoil
from imvar import CheckpointError, InputError, StableDiffusionImageVariationPipeline
from imvar.conversion import convert
from imvar.weights.reading import read_checkpoint

SECONDS, MEGABYTES, HUNG = 2.0, 200, 20.0  # the most that a case may take; after the last it is killed

MODELS = [kind for kind in LOADERS.values() if issubclass(kind, nn.Module)]
OPTIONS = {
    "to": ["diffusers", "original"],
    "dtype": ["keep", "fp16"],
    "ema": ["auto", "yes", "no"],
    "part": ["unet", "vae", "image_encoder", "safety_checker"],
}
Tensors = dict[str, torch.Tensor]


def targets(folder: Path) -> list[list[Path]]:
    """The files to spoil, grouped by part and kind: each group is to be had as often as another."""
    groups = defaultdict(list)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        groups[path.parent, path.suffix].append(path)
    return list(groups.values())


# Ways to load


def load_part(folder: Path, rng: random.Random) -> Tensors:
    loaded = LOADERS[folder.name].from_pretrained(folder)
    return loaded.state_dict() if isinstance(loaded, nn.Module) else {}


def load_pipeline(file: Path, rng: random.Random) -> Tensors:
    """The pipeline that a file belongs to, without most of its other parts."""
    part = file.parent.name
    others = {
        name: None
        for name in LOADERS
        if name not in (part, "feature_extractor") and (part in LOADERS or rng.random() < 0.5)
    }
    return held(StableDiffusionImageVariationPipeline.from_pretrained(file.parents[part in LOADERS], **others))


def load_single(file: Path, rng: random.Random, **options: Any) -> Tensors:
    """The pipeline, or one part, of a single file."""
    kind = rng.choice([StableDiffusionImageVariationPipeline, *MODELS])
    if rng.random() < 0.3:
        options["ema"] = rng.choice(OPTIONS["ema"])
    loaded = kind.from_single_file(file, **options)
    return loaded.state_dict() if isinstance(loaded, nn.Module) else held(loaded)


def held(pipe: StableDiffusionImageVariationPipeline) -> Tensors:
    return {
        f"{part}.{key}": tensor for part, module in pipe.modules.items() for key, tensor in module.state_dict().items()
    }


def convert_dry(source: Path, rng: random.Random, **options: Any) -> Tensors:
    """What would be converted. An option that does not fit the source is refused by its name, if it was given."""
    options |= {name: rng.choice(values) for name, values in OPTIONS.items() if rng.random() < 0.3}
    target = source.parents[1] / ("new.safetensors" if options.get("to") == "original" else "new")
    try:
        report = convert(source, target, dry_run=True, **options)
    except InputError as error:
        if re.split("[:=]", str(error))[0] not in options:
            raise
        raise CheckpointError(str(error), path=source) from error
    assert not target.exists()
    return {
        f"{name}.{key}": tensor
        for name, part in report.parts.items()
        if part.has_weights
        for key, tensor in part.value.state_dict().items()
    }


def ways(file: Path, folder: Path) -> list[Callable[[random.Random], Tensors]]:
    """All the ways to load something that `file` takes part in."""
    layout, whole, ours = file.relative_to(folder).parts[0], folder / "pipeline", folder / "single" / "ours"
    if layout == "original":
        return [lambda rng: read_checkpoint(file)[0], partial(load_single, file), partial(convert_dry, file)]
    if layout == "single":
        return [*5 * [partial(load_single, file)], partial(convert_dry, file)]
    if layout == "pipeline":
        (unspoilt,) = ours.iterdir()
        alone = {"part": file.parent.name} if file.parent.name in OPTIONS["part"] else {}
        return [
            *6 * [partial(load_pipeline, file)],
            partial(load_single, unspoilt, config=whole),
            partial(convert_dry, whole, **alone),
            partial(convert_dry, unspoilt, fill=whole),
            partial(convert_dry, unspoilt, config=whole, **alone),
        ]
    single = [] if file.suffix == ".json" else [partial(load_single, file)]
    return [*6 * [partial(load_part, file.parent)], partial(convert_dry, file.parent), *single]


# A case


def load(way: Callable[[random.Random], Tensors], rng: random.Random) -> None:
    """Load in this way, and look at every number."""
    with warnings.catch_warnings(action="ignore"):
        tensors = way(rng)
    for key, tensor in tensors.items():
        assert tensor.device.type == "cpu", key
        float(tensor.double().sum()) if not tensor.is_complex() else None


def run_case(number: int, seed: int, folder: Path, groups: list[list[Path]]) -> tuple[str, str]:
    """Spoil one of these files and load what it belongs to: what came of it, and what was done to which file.

    Anything but "loaded" and "refused" is a fault.
    """
    rng = random.Random(f"{seed} {number}")
    file = rng.choice(rng.choice(groups))
    content, before = file.read_bytes(), peak()
    work, start = time.process_time(), time.perf_counter()
    gc.disable()  # to look for garbage in all that was loaded before is no work of this load
    done = f"{file.relative_to(folder)}: {spoil(file, rng)}"
    try:
        load(rng.choice(ways(file, folder)), rng)
        outcome = "loaded"
    except CheckpointError as error:
        outcome = "refused" if error.path is not None and len(str(error)) < 5000 else f"BAD MESSAGE {error!s:.300}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = f"RAISED {type(error).__name__}: {error!s:.300}\n{''.join(traceback.format_tb(error.__traceback__))}"
    finally:
        gc.enable()
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
        file.write_bytes(content)
    worked, took = time.process_time() - work, time.perf_counter() - start
    if worked > SECONDS or took > 5 * SECONDS:  # of its own, whatever else the machine is busy with
        outcome = f"SLOW {worked:.1f} s of {took:.1f} s, {outcome}"
    if (grown := peak() - before) > MEGABYTES * 1000:
        outcome = f"LARGE {grown / 1000:.0f} MB, {outcome}"
    return outcome, done


def warm_up(folder: Path) -> None:
    """Load everything unspoilt, in every way: what the libraries do only once is no case's fault."""
    for file in (
        folder / "pipeline" / "model_index.json",
        folder / "single" / "full" / "model.ckpt",
        *folder.glob("bin/*/*.bin"),
    ):
        for way in ways(file, folder):
            with suppress(CheckpointError):  # not every option fits
                load(way, random.Random(0))


def peak() -> int:
    """The most memory that this process ever had, in kB; the files here are too small to count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Many cases


def work(pipe: Connection, seed: int, folder: Path, numbers: range) -> None:
    """In a child process: say which case begins, then what came of it."""
    torch.set_num_threads(1)
    mine = shutil.copytree(folder / "base", folder / str(os.getpid()))
    groups = targets(mine)
    warm_up(mine)
    for number in numbers:
        pipe.send((number, None))
        pipe.send((number, run_case(number, seed, mine, groups)))
    pipe.send(None)


def run(cases: int, seed: int, workers: int, folder: Path) -> Counter[str]:
    """All cases, shared out among child processes; prints what is wrong, returns how many there were of each."""
    make(folder / "base")
    context, outcomes = multiprocessing.get_context("spawn"), Counter[str]()
    left = [range(first, cases, workers) for first in range(workers)]
    running: dict[Connection, Any] = {}

    def start(numbers: range) -> None:
        ours, theirs = context.Pipe()
        child = context.Process(target=work, args=(theirs, seed, folder, numbers), daemon=True)
        child.start()
        theirs.close()
        running[ours] = [child, numbers, time.monotonic() + 60]

    for numbers in left:
        start(numbers)
    while running:
        for pipe in multiprocessing.connection.wait(list(running), timeout=1):
            child, numbers, _ = running[pipe]  # type: ignore[index]
            try:
                message = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                child.join()
                message = numbers[0], (f"CRASHED with exit code {child.exitcode}", "")
                del running[pipe]  # type: ignore[arg-type]
                start(numbers[1:])
            if message is None:
                del running[pipe]  # type: ignore[arg-type]
            elif message[1] is None:
                running[pipe][1:] = numbers[numbers.index(message[0]) :], time.monotonic()  # type: ignore[index]
            else:
                number, (outcome, done) = message
                outcomes[outcome.split()[0]] += 1
                if outcome not in ("loaded", "refused"):
                    print(f"case {number}: {done}: {outcome}", flush=True)
                if sum(outcomes.values()) % 10_000 == 0:
                    print(f"{sum(outcomes.values())} of {cases}", flush=True)
        for child, _, since in list(running.values()):
            if time.monotonic() - since > HUNG:
                child.kill()
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--case", type=int, help="run this one alone")
    args = parser.parse_args()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="imvar-fuzz-", dir=memory) as name:
        if args.case is not None:
            make(Path(name))
            print(*run_case(args.case, args.seed, Path(name), targets(Path(name))), sep="\n")
            return
        start = time.monotonic()
        outcomes = run(args.cases, args.seed, args.workers, Path(name))
    print(f"{args.cases} cases in {time.monotonic() - start:.0f} s: {dict(outcomes)}")
    if set(outcomes) - {"loaded", "refused"}:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
