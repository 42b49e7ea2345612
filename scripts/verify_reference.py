"""Prove that imvar computes what diffusers and transformers compute, at the published size.

    python scripts/verify_reference.py                    # random weights: about 10 minutes on 2 cores, 12 GB of disk
    python scripts/verify_reference.py --checkpoint lambdalabs/sd-image-variations-diffusers --revision v2.0
    python scripts/verify_reference.py --quick            # a tiny model: seconds

Both libraries load the same files and answer the same questions, one model in memory at a time, and then make a
short whole run on a photograph. The table has the largest differences; the exit status is 1 if one of them is
above its tolerance. Needs the `test` extra.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from reference_probes import PHOTOS, Answers, embed, judge, noise, photograph, predict, see, there_and_back, vary, walk
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import imvar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.published_checkpoint import FILES, Checkpoint, write_checkpoint
from tests.support.random_checkpoint import tiny_pipeline

SIDES = {  # of each part: the reference's class, and ours
    "feature_extractor": (CLIPImageProcessorPil, imvar.CLIPImageProcessor),
    "image_encoder": (transformers.CLIPVisionModelWithProjection, imvar.CLIPVisionModelWithProjection),
    "vae": (diffusers.AutoencoderKL, imvar.AutoencoderKL),
    "unet": (diffusers.UNet2DConditionModel, imvar.UNet2DConditionModel),
    "safety_checker": (StableDiffusionSafetyChecker, imvar.StableDiffusionSafetyChecker),
    "PNDM": (diffusers.PNDMScheduler, imvar.PNDMScheduler),
    "DDIM": (diffusers.DDIMScheduler, imvar.DDIMScheduler),
    "LMS": (diffusers.LMSDiscreteScheduler, imvar.LMSDiscreteScheduler),
    "pipeline": (diffusers.StableDiffusionImageVariationPipeline, imvar.StableDiffusionImageVariationPipeline),
}
RELATIVE = ("image_encoder", "vae", "unet", "safety_checker", "PNDM", "DDIM", "LMS")  # as in tests/reference
TOLERANCE = {
    "feature_extractor": 0.0,
    "image_encoder": 1e-5,
    "vae": 1e-5,
    "unet": 1e-5,
    "safety_checker": 1e-5,
    "PNDM": 1e-6,
    "DDIM": 1e-6,
    "LMS": 1e-6,
    "pipeline": 1e-4,
}
OF_ANSWERS = {"flags": 0.0, "timesteps": 0.0, "files": 0.0, "PIL levels": 1.0}  # these first, by how `what` begins


@dataclass(frozen=True)
class Row:
    """One comparison. Of networks and schedulers the tolerance is relative to the reference's largest value."""

    part: str
    what: str
    difference: float
    largest: float

    @property
    def relative(self) -> float:
        return self.difference / self.largest if self.largest else self.difference

    @property
    def tolerance(self) -> float:
        return next((limit for words, limit in OF_ANSWERS.items() if self.what.startswith(words)), TOLERANCE[self.part])

    @property
    def ok(self) -> bool:
        return (self.relative if self.part in RELATIVE else self.difference) <= self.tolerance

    def cells(self) -> list[str]:
        tolerance = f"{self.tolerance:g}" + (" relative" if self.part in RELATIVE else "")
        return [
            self.part,
            self.what,
            f"{self.difference:.2e}",
            f"{self.largest:.3g}",
            f"{self.relative:.1e}",
            tolerance,
            "yes" if self.ok else "**NO**",
        ]


# Both sides


def both(part: str, load: Callable[[Any], Any], run: Callable[[Any], Answers]) -> Iterator[Row]:
    """Load, ask and let go of the reference, then of ours, and compare the answers."""
    answers = []
    for side in SIDES[part]:
        start, library = time.perf_counter(), side.__module__.partition(".")[0]
        with torch.no_grad():
            model = load(side)
            answers.append(run(model))
            del model
        gc.collect()
        print(f"{part}, {library}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return rows(part, *answers)


def rows(part: str, theirs: Answers, ours: Answers) -> Iterator[Row]:
    if theirs.keys() != ours.keys():
        raise SystemExit(f"{part}: only one side has {', '.join(sorted(theirs.keys() ^ ours.keys()))}")
    for what, reference in theirs.items():
        if reference.shape != ours[what].shape or not (reference.isfinite().all() and ours[what].isfinite().all()):
            raise SystemExit(f"{part}, {what}: {reference.shape} and {ours[what].shape}, or values that are not finite")
        difference = (reference.float() - ours[what].float()).abs().max().item()
        yield Row(part, what, difference, reference.float().abs().max().item())


def worst(compared: Iterable[Row], what: str) -> Row:
    return replace(max(compared, key=lambda row: (row.relative, row.largest)), what=what)


def compare_part(checkpoint: Checkpoint, part: str, run: Callable[[Any], Answers]) -> Iterator[Row]:
    """One part, from pickles where there are any, and whether each kind of file gives us the same tensors."""
    formats = checkpoint.formats(part) if part in FILES else [{}]
    yield from both(part, lambda side: side.from_pretrained(checkpoint.folder, subfolder=part, **formats[0]), run)
    if len(formats) > 1:
        ours = SIDES[part][1]
        pair = [ours.from_pretrained(checkpoint.folder, subfolder=part, **kind).state_dict() for kind in formats]
        yield worst(rows(part, *pair), "files: .bin and .safetensors")


# The whole of it


def verify(checkpoint: Checkpoint, steps: int) -> Iterator[Row]:
    """All comparisons, in the order in which a picture passes through the parts."""
    extractor = SIDES["feature_extractor"][1].from_pretrained(checkpoint.folder, subfolder="feature_extractor")
    pixels = extractor([photograph(path) for path in PHOTOS], return_tensors="pt").pixel_values
    resized = photograph(PHOTOS[0]).resize((checkpoint.side, checkpoint.side))
    picture = torch.tensor(np.asarray(resized)).permute(2, 0, 1)[None] / 127.5 - 1  # h w c -> 1 c h w
    latents, width = noise(2, *checkpoint.latents, seed=0), checkpoint.settings("unet")["cross_attention_dim"]

    yield from compare_part(checkpoint, "feature_extractor", see)
    yield from compare_part(checkpoint, "image_encoder", lambda model: embed(model, pixels))
    yield from compare_part(checkpoint, "vae", lambda model: there_and_back(model, picture, latents[:1]))
    yield from compare_part(checkpoint, "unet", lambda model: predict(model, latents, width))
    yield from compare_part(checkpoint, "safety_checker", lambda model: judge(model, pixels))
    for name, options in ("PNDM", {}), ("DDIM", {}), ("DDIM", {"eta": 1.0}), ("LMS", {}):
        compared = both(
            name,
            lambda side: side.from_pretrained(checkpoint.folder, subfolder="scheduler"),
            lambda scheduler, options=options: walk(scheduler, 50, checkpoint.latents, **options),
        )
        yield next(compared)
        yield worst(compared, ", ".join(["worst of 50 steps", *(f"{key} {value:g}" for key, value in options.items())]))

    def load(side: Any) -> Any:
        which = SIDES["feature_extractor"][SIDES["pipeline"].index(side)]  # the reference would prefer torchvision's
        eyes = which.from_pretrained(checkpoint.folder, subfolder="feature_extractor")
        return side.from_pretrained(checkpoint.folder, feature_extractor=eyes, **checkpoint.formats("unet")[-1])

    for row in both("pipeline", load, lambda pipe: vary(pipe, photograph(PHOTOS[0]), steps)):
        yield replace(row, what=f"{row.what}, {checkpoint.side} px, {steps} steps")


def table(compared: Iterable[Row]) -> str:
    head = ["part", "what", "max abs difference", "max abs reference", "relative", "tolerance", "ok"]
    lines = [head, ["---"] * 2 + ["---:"] * 4 + ["---"], *(row.cells() for row in compared)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a folder or a hub id, instead of random weights")
    parser.add_argument("--revision")
    parser.add_argument("--quick", action="store_true", help="a tiny model with random weights")
    parser.add_argument("--steps", type=int, default=3, help="of the whole run (default: 3)")
    parser.add_argument("--threads", type=int, help="for PyTorch (default: its own choice)")
    parser.add_argument("--workdir", type=Path, help="where to make the folder of random weights")
    parser.add_argument("--keep", action="store_true", help="do not delete that folder afterwards")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    return parser.parse_args()


def obtain(args: argparse.Namespace, workdir: Path) -> Checkpoint:
    """The checkpoint that was asked for: there already, downloaded, or made in `workdir`."""
    if args.checkpoint:
        return Checkpoint.at(args.checkpoint, args.revision)
    if args.quick:
        for safe in (False, True):
            tiny_pipeline().save_pretrained(workdir, safe_serialization=safe)
    else:
        write_checkpoint(workdir)
    return Checkpoint(workdir)


def quiet() -> None:
    """Neither library's advice belongs in the table."""
    warnings.simplefilter("ignore")
    logging.getLogger("imvar").setLevel(logging.ERROR)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def main() -> int:
    args, start = arguments(), time.perf_counter()
    quiet()
    if args.threads:
        torch.set_num_threads(args.threads)
    workdir = Path(tempfile.mkdtemp(prefix="imvar-verify-", dir=args.workdir))
    try:
        checkpoint = obtain(args, workdir)
        print(f"{checkpoint.folder}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        compared = list(verify(checkpoint, args.steps))
    finally:
        if not args.keep:
            shutil.rmtree(workdir)
    libraries, used = (imvar, torch, diffusers, transformers), resource.getrusage(resource.RUSAGE_SELF)
    about = {
        "checkpoint": args.checkpoint or ("tiny" if args.quick else "published size") + ", random weights",
        "revision": args.revision,
        "ok": all(row.ok for row in compared),
        "seconds": round(time.perf_counter() - start),
        "CPU seconds": round(used.ru_utime + used.ru_stime),
        "peak GiB": round(used.ru_maxrss / 2**20, 1),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{library.__name__: library.__version__ for library in libraries},
    }
    summary = ", ".join(f"{key}: {value}" for key, value in about.items() if value is not None)
    print(table(compared), summary, sep="\n\n")
    if args.json:
        numbers = [asdict(row) | {"tolerance": row.tolerance, "ok": row.ok} for row in compared]
        args.json.write_text(json.dumps(about | {"rows": numbers}, indent=2) + "\n")
    return 0 if about["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
