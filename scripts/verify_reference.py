"""Verify that imvar computes the same as diffusers and transformers, at the published size.

    python scripts/verify_reference.py                    # random weights: about 10 minutes on 2 cores, 12 GB of disk
    python scripts/verify_reference.py --checkpoint lambdalabs/sd-image-variations-diffusers --revision v2.0
    python scripts/verify_reference.py --quick            # a tiny model: seconds

Both libraries load the same files and get the same inputs, one model in memory at a time, and then run the whole
pipeline on a photo for a few steps. The table has the largest differences; the exit status is 1 if one of them
exceeds its tolerance. Needs the `test` extra.
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
from reference_probes import (
    PHOTOS,
    Outputs,
    encode_and_decode,
    noise,
    open_photo,
    run_feature_extractor,
    run_image_encoder,
    run_pipeline,
    run_safety_checker,
    run_scheduler,
    run_unet,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import imvar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.published_checkpoint import FILES, Checkpoint, write_checkpoint
from tests.support.random_checkpoint import tiny_pipeline

CLASSES = {  # of each component: the reference's class, imvar's class
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
OUTPUT_TOLERANCE = {"flags": 0.0, "timesteps": 0.0, "files": 0.0, "PIL levels": 1.0}  # by the start of `output`, first


@dataclass(frozen=True)
class Comparison:
    """Largest difference of one output. The tolerance of networks and schedulers is relative to the largest value."""

    component: str
    output: str
    difference: float
    largest: float

    @property
    def relative(self) -> float:
        return self.difference / self.largest if self.largest else self.difference

    @property
    def tolerance(self) -> float:
        return next(
            (limit for start, limit in OUTPUT_TOLERANCE.items() if self.output.startswith(start)),
            TOLERANCE[self.component],
        )

    @property
    def ok(self) -> bool:
        return (self.relative if self.component in RELATIVE else self.difference) <= self.tolerance

    def cells(self) -> list[str]:
        tolerance = f"{self.tolerance:g}" + (" relative" if self.component in RELATIVE else "")
        return [
            self.component,
            self.output,
            f"{self.difference:.2e}",
            f"{self.largest:.3g}",
            f"{self.relative:.1e}",
            tolerance,
            "yes" if self.ok else "**NO**",
        ]


# Both libraries


def compare(component: str, load: Callable[[Any], Any], run: Callable[[Any], Outputs]) -> Iterator[Comparison]:
    """Load, run and free the reference, then imvar, and compare the outputs."""
    outputs = []
    for cls in CLASSES[component]:
        start, library = time.perf_counter(), cls.__module__.partition(".")[0]
        with torch.no_grad():
            model = load(cls)
            outputs.append(run(model))
            del model
        gc.collect()
        print(f"{component}, {library}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return differences(component, *outputs)


def differences(component: str, reference: Outputs, outputs: Outputs) -> Iterator[Comparison]:
    if reference.keys() != outputs.keys():
        raise SystemExit(f"{component}: only one library has {', '.join(sorted(reference.keys() ^ outputs.keys()))}")
    for name, expected in reference.items():
        out = outputs[name]
        if expected.shape != out.shape or not (expected.isfinite().all() and out.isfinite().all()):
            raise SystemExit(f"{component}, {name}: {expected.shape} and {out.shape}, or values that are not finite")
        difference = (expected.float() - out.float()).abs().max().item()
        yield Comparison(component, name, difference, expected.float().abs().max().item())


def worst(compared: Iterable[Comparison], output: str) -> Comparison:
    return replace(max(compared, key=lambda row: (row.relative, row.largest)), output=output)


def compare_component(checkpoint: Checkpoint, component: str, run: Callable[[Any], Outputs]) -> Iterator[Comparison]:
    """Compare one component, loaded from .bin if there is one; and the tensors of its .bin with its .safetensors."""
    formats = checkpoint.formats(component) if component in FILES else [{}]
    yield from compare(
        component, lambda cls: cls.from_pretrained(checkpoint.folder, subfolder=component, **formats[0]), run
    )
    if len(formats) > 1:
        cls = CLASSES[component][1]
        pair = [cls.from_pretrained(checkpoint.folder, subfolder=component, **kind).state_dict() for kind in formats]
        yield worst(differences(component, *pair), "files: .bin and .safetensors")


# All comparisons


def verify(checkpoint: Checkpoint, steps: int) -> Iterator[Comparison]:
    """Yield all comparisons, in the order of a call of the pipeline."""
    extractor = CLASSES["feature_extractor"][1].from_pretrained(checkpoint.folder, subfolder="feature_extractor")
    pixels = extractor([open_photo(path) for path in PHOTOS], return_tensors="pt").pixel_values
    resized = open_photo(PHOTOS[0]).resize((checkpoint.side, checkpoint.side))
    image = torch.tensor(np.asarray(resized)).permute(2, 0, 1)[None] / 127.5 - 1  # h w c -> 1 c h w
    latents, width = noise(2, *checkpoint.latents, seed=0), checkpoint.settings("unet")["cross_attention_dim"]

    yield from compare_component(checkpoint, "feature_extractor", run_feature_extractor)
    yield from compare_component(checkpoint, "image_encoder", lambda model: run_image_encoder(model, pixels))
    yield from compare_component(checkpoint, "vae", lambda model: encode_and_decode(model, image, latents[:1]))
    yield from compare_component(checkpoint, "unet", lambda model: run_unet(model, latents, width))
    yield from compare_component(checkpoint, "safety_checker", lambda model: run_safety_checker(model, pixels))
    for name, options in ("PNDM", {}), ("DDIM", {}), ("DDIM", {"eta": 1.0}), ("LMS", {}):
        compared = compare(
            name,
            lambda cls: cls.from_pretrained(checkpoint.folder, subfolder="scheduler"),
            lambda scheduler, options=options: run_scheduler(scheduler, 50, checkpoint.latents, **options),
        )
        yield next(compared)
        yield worst(compared, ", ".join(["worst of 50 steps", *(f"{key} {value:g}" for key, value in options.items())]))

    def load(cls: Any) -> Any:
        extractor_cls = CLASSES["feature_extractor"][
            CLASSES["pipeline"].index(cls)
        ]  # diffusers would load torchvision's
        feature_extractor = extractor_cls.from_pretrained(checkpoint.folder, subfolder="feature_extractor")
        return cls.from_pretrained(
            checkpoint.folder, feature_extractor=feature_extractor, **checkpoint.formats("unet")[-1]
        )

    for row in compare("pipeline", load, lambda pipe: run_pipeline(pipe, open_photo(PHOTOS[0]), steps)):
        yield replace(row, output=f"{row.output}, {checkpoint.side} px, {steps} steps")


def table(compared: Iterable[Comparison]) -> str:
    head = ["component", "output", "max abs difference", "max abs reference", "relative", "tolerance", "ok"]
    lines = [head, ["---"] * 2 + ["---:"] * 4 + ["---"], *(row.cells() for row in compared)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a folder or a hub id, instead of random weights")
    parser.add_argument("--revision")
    parser.add_argument("--quick", action="store_true", help="a tiny model with random weights")
    parser.add_argument("--steps", type=int, default=3, help="of the pipeline (default: 3)")
    parser.add_argument("--threads", type=int, help="for PyTorch (default: its own choice)")
    parser.add_argument("--workdir", type=Path, help="where to write the folder of random weights")
    parser.add_argument("--keep", action="store_true", help="do not delete that folder afterwards")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    return parser.parse_args()


def obtain(args: argparse.Namespace, workdir: Path) -> Checkpoint:
    """Return the checkpoint: a folder or hub id as given, or one with random weights written to `workdir`."""
    if args.checkpoint:
        return Checkpoint.at(args.checkpoint, args.revision)
    if args.quick:
        for safe in (False, True):
            tiny_pipeline().save_pretrained(workdir, safe_serialization=safe)
    else:
        write_checkpoint(workdir)
    return Checkpoint(workdir)


def quiet() -> None:
    """Silence the libraries' warnings and progress bars."""
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
    libraries, usage = (imvar, torch, diffusers, transformers), resource.getrusage(resource.RUSAGE_SELF)
    about = {
        "checkpoint": args.checkpoint or ("tiny" if args.quick else "published size") + ", random weights",
        "revision": args.revision,
        "ok": all(row.ok for row in compared),
        "seconds": round(time.perf_counter() - start),
        "CPU seconds": round(usage.ru_utime + usage.ru_stime),
        "peak GiB": round(usage.ru_maxrss / 2**20, 1),
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
