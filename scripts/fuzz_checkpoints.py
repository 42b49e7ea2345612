"""Spoil tiny checkpoints in a seeded way and load them: each loads whole, or raises CheckpointError, and soon.

    python scripts/fuzz_checkpoints.py [--cases 100000] [--seed 0] [--workers 2] [--case N]

A case spoils one file of one part, by its meaning (settings, headers, indexes, pickles) or by its bytes, or puts
something else in its place. Cases run in child processes, so that one that crashes or hangs is told apart. What fails
is printed with its number, and `--case N` runs that one alone and shows the whole error.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import tiny_pipeline
from safetensors.torch import save_file
from spoiling import spoil
from torch import nn

import imvar
from imvar import CheckpointError, StableDiffusionImageVariationPipeline
from imvar.weights.reading import read_checkpoint

SECONDS, MEGABYTES, HUNG = 2.0, 200, 20.0  # the most that a case may take; after the last it is killed

LOADERS: dict[str, Any] = {
    "unet": imvar.UNet2DConditionModel, "vae": imvar.AutoencoderKL,
    "image_encoder": imvar.CLIPVisionModelWithProjection, "safety_checker": imvar.StableDiffusionSafetyChecker,
    "scheduler": imvar.PNDMScheduler, "feature_extractor": imvar.CLIPImageProcessor,
}
SMALLER = {"unet": {"block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",), "norm_num_groups": 4,
                    "up_block_types": ("CrossAttnUpBlock2D",), "layers_per_block": 1, "cross_attention_dim": 8,
                    "attention_head_dim": 2, "sample_size": 8},
           "vae": {"block_out_channels": (4,), "norm_num_groups": 2, "sample_size": 8}}


# What a checkpoint looks like before it is spoilt


def make(folder: Path) -> None:
    """The parts in every layout, `folder/layout/part`, a pipeline, and two original checkpoints."""
    torch.manual_seed(0)  # the same bytes every time, so that a case is the same
    pipe = tiny_pipeline()
    parts = dict(pipe.components) | {name: LOADERS[name](**settings) for name, settings in SMALLER.items()}
    for layout, options in {"safetensors": {}, "bin": {"safe_serialization": False},
                            "sharded": {"max_shard_size": "4KB"}}.items():
        for name, part in parts.items():
            if layout == "safetensors" or isinstance(part, nn.Module):
                part.save_pretrained(folder / layout / name, **options)
    old = folder / "old" / "unet"
    shutil.copytree(folder / "bin" / "unet", old)
    weights = torch.load(old / "diffusion_pytorch_model.bin", weights_only=True)
    torch.save(weights, old / "diffusion_pytorch_model.bin", _use_new_zipfile_serialization=False)
    StableDiffusionImageVariationPipeline(**parts).save_pretrained(folder / "pipeline")
    (folder / "original").mkdir()
    held = {"epoch": 3, "state_dict": weights, "optimizer_states": [{"state": {0: torch.ones(3)}}], "hparams": None}
    torch.save(held, folder / "original" / "nested.ckpt")
    torch.save(weights, folder / "original" / "flat.pt")
    save_file(weights, folder / "original" / "model.safetensors")


def targets(folder: Path) -> list[list[Path]]:
    """The files to spoil, grouped by part and kind: each group is to be had as often as another."""
    groups = defaultdict(list)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        groups[path.parent, path.suffix].append(path)
    return list(groups.values())


# A case


def load(file: Path, folder: Path, rng: random.Random) -> None:
    """Load what `file` is a part of, and look at every number of it."""
    layout, part, *_ = file.relative_to(folder).parts
    with warnings.catch_warnings(action="ignore"):
        if layout == "original":
            tensors = read_checkpoint(file)[0]
        elif layout == "pipeline":
            others = {name: None for name in LOADERS if name not in (part, "feature_extractor")
                      and (part in LOADERS or rng.random() < 0.5)}
            pipe = StableDiffusionImageVariationPipeline.from_pretrained(file.parents[part in LOADERS], **others)
            tensors = {key: tensor for module in pipe.modules.values() for key, tensor in module.state_dict().items()}
        else:
            loaded = LOADERS[part].from_pretrained(folder / layout / part)
            tensors = loaded.state_dict() if isinstance(loaded, nn.Module) else {}
    for key, tensor in tensors.items():
        assert tensor.device.type == "cpu", key
        assert tensor.is_floating_point() or layout == "original", key
        float(tensor.double().sum()) if not tensor.is_complex() else None


def run_case(number: int, seed: int, folder: Path, groups: list[list[Path]]) -> tuple[str, str]:
    """Spoil one of these files and load what it belongs to: what came of it, and what was done to which file.

    Anything but "loaded" and "refused" is a fault.
    """
    rng = random.Random(f"{seed} {number}")
    file = rng.choice(rng.choice(groups))
    content, before, start = file.read_bytes(), peak(), time.perf_counter()
    done = f"{file.relative_to(folder)}: {spoil(file, rng)}"
    try:
        load(file, folder, rng)
        outcome = "loaded"
    except CheckpointError as error:
        outcome = "refused" if error.path is not None and len(str(error)) < 5000 else f"BAD MESSAGE {error!s:.300}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = f"RAISED {type(error).__name__}: {error!s:.300}\n{''.join(traceback.format_tb(error.__traceback__))}"
    finally:
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
        file.write_bytes(content)
    if (seconds := time.perf_counter() - start) > SECONDS:
        outcome = f"SLOW {seconds:.1f} s, {outcome}"
    if (grown := peak() - before) > MEGABYTES * 1000:
        outcome = f"LARGE {grown / 1000:.0f} MB, {outcome}"
    return outcome, done


def warm_up(folder: Path) -> None:
    """Load everything unspoilt: what the libraries do only once is no case's fault."""
    for file in (folder / "pipeline" / "model_index.json", folder / "original" / "nested.ckpt",
                 *folder.glob("*/*/config.json")):
        load(file, folder, random.Random(0))


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
                running[pipe][1:] = numbers[numbers.index(message[0]):], time.monotonic()  # type: ignore[index]
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
