"""Soak test: call one pipeline repeatedly with random sizes, batches and options, and fail if memory or files leak.

    python scripts/soak.py [-n 500] [--checkpoint FOLDER]

Prints memory and open files, and fails if they grew from the second third of the calls to the last third. Before each
measurement freed memory is returned to the system, and oneDNN's primitive cache is limited to 64 shapes (default 1024),
because neither is a leak. Without --checkpoint: a tiny pipeline with random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import random
import sys
import threading
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

import imvar
from imvar import StableDiffusionImageVariationPipeline, schedulers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.random_checkpoint import tiny_pipeline

PHOTO = Path(__file__).resolve().parents[1] / "tests" / "photos" / "chelsea.jpg"
MAX_GROWTH_MB = 4
CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}  # read when torch is loaded


def resident_mb() -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc's
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def random_call(pipe: Any, photo: Image.Image, rng: random.Random, side: int) -> str:
    """Call the pipeline with random settings, some of them invalid, and return the outcome."""
    kind = getattr(schedulers, rng.choice(schedulers.__all__))
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    rng.choice(
        [
            pipe.enable_attention_slicing,
            pipe.disable_attention_slicing,
            pipe.enable_vae_slicing,
            pipe.disable_vae_slicing,
            pipe.enable_vae_tiling,
            pipe.disable_vae_tiling,
            pipe.disable_freeu,
            lambda: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        ]
    )()
    batch = rng.randint(1, 3)
    options = {
        "num_images_per_prompt": batch,
        "num_inference_steps": rng.randint(1, 4),
        "height": side + 8 * rng.randint(-2, 2),
        "width": side + 8 * rng.randint(-2, 2),
        "guidance_scale": rng.choice([1.0, 3.0, 7.5]),
        "seed": rng.randrange(10**6),
        "cache_interval": rng.choice([1, 1, 2]),
        "output_type": rng.choice(["pil", "np", "pt", "latent"]),
    }
    fault = rng.choice([{}] * 6 + [{"callback": interrupt}, {"guidance_scale": float("nan")}, {"height": 7}])
    try:
        with torch.inference_mode() if rng.random() < 0.1 else contextlib.nullcontext():
            pipe(photo, **(options | fault))
    except KeyboardInterrupt:
        return "interrupted"
    except imvar.ImvarError:
        return "refused"
    return "completed"


def soak(pipe: Any, calls: int, side: int, report: int) -> bool:
    """Return whether memory and open files are stable."""
    rng, photo = random.Random(0), Image.open(PHOTO).convert("RGB")
    memory, files, outcomes = [], [], dict.fromkeys(("completed", "interrupted", "refused"), 0)
    for i in range(calls):
        outcomes[random_call(pipe, photo, rng, side)] += 1
        if i % 5 == 4:
            memory.append(resident_mb())
            files.append(open_files())
        if i % report == report - 1:
            counts = ", ".join(f"{number} {name}" for name, number in outcomes.items())
            print(
                f"{i + 1:>5} calls: {memory[-1]:7.1f} MB, {files[-1]} open files, "
                f"{threading.active_count()} threads, {counts}",
                flush=True,
            )
    third = len(memory) // 3
    before, after = median(memory[third : 2 * third]), median(memory[-third:])
    print(
        f"memory: median of the second third {before:.1f} MB, of the last third {after:.1f} MB; "
        f"open files {files[third]} and {files[-1]}"
    )
    return after - before < MAX_GROWTH_MB and files[-1] <= files[third]


def main() -> int:
    if not CACHES.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | CACHES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=500, help="number of calls")
    parser.add_argument("--checkpoint")
    args = parser.parse_args()
    pipe = (
        StableDiffusionImageVariationPipeline.from_pretrained(args.checkpoint) if args.checkpoint else tiny_pipeline()
    )
    pipe.set_progress_bar_config(disable=True)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return 0 if soak(pipe, args.n, size, report=max(args.n // 10, 5)) else 1


if __name__ == "__main__":
    sys.exit(main())
