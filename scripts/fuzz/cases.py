"""Cases: corrupt one file of a tiny checkpoint, or an image, load what it belongs to, and classify the outcome."""

from __future__ import annotations

import gc
import random
import re
import resource
import shutil
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn

from fuzz.corpus import LOADERS
from fuzz.corruptions import corrupt
from imvar import CheckpointError, InputError, StableDiffusionImageVariationPipeline
from imvar.conversion import convert
from imvar.image.load_image import load_image
from imvar.weights.reading import read_checkpoint

MAX_SECONDS, MAX_MEGABYTES = 2.0, 200  # per case
MAX_PIXELS = 2**20  # half of those that Pillow decodes

MODELS = [kind for kind in LOADERS.values() if issubclass(kind, nn.Module)]
OPTIONS = {
    "to": ["diffusers", "original"],
    "dtype": ["keep", "fp16"],
    "ema": ["auto", "yes", "no"],
    "part": ["unet", "vae", "image_encoder", "safety_checker"],
}
Tensors = dict[str, torch.Tensor]


def file_groups(folder: Path) -> list[list[Path]]:
    """Return the files to corrupt, grouped by part and suffix, so that each group is drawn equally often."""
    groups = defaultdict(list)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        groups[path.parent, path.suffix].append(path)
    return list(groups.values())


# Ways to load


def load_part(folder: Path, rng: random.Random) -> Tensors:
    loaded = LOADERS[folder.name].from_pretrained(folder)
    return loaded.state_dict() if isinstance(loaded, nn.Module) else {}


def load_pipeline(file: Path, rng: random.Random) -> Tensors:
    """Load the pipeline that a file belongs to, without most of its other components."""
    part = file.parent.name
    omitted = {
        name: None
        for name in LOADERS
        if name not in (part, "feature_extractor") and (part in LOADERS or rng.random() < 0.5)
    }
    return pipeline_tensors(
        StableDiffusionImageVariationPipeline.from_pretrained(file.parents[part in LOADERS], **omitted)
    )


def load_single(file: Path, rng: random.Random, **options: Any) -> Tensors:
    """Load the pipeline or one model from a single file."""
    kind = rng.choice([StableDiffusionImageVariationPipeline, *MODELS])
    if rng.random() < 0.3:
        options["ema"] = rng.choice(OPTIONS["ema"])
    loaded = kind.from_single_file(file, **options)
    return loaded.state_dict() if isinstance(loaded, nn.Module) else pipeline_tensors(loaded)


def pipeline_tensors(pipe: StableDiffusionImageVariationPipeline) -> Tensors:
    return {
        f"{part}.{key}": tensor for part, module in pipe.modules.items() for key, tensor in module.state_dict().items()
    }


def convert_dry(source: Path, rng: random.Random, **options: Any) -> Tensors:
    """Return the tensors that `convert` would write; an error about an option must name one that was given."""
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
        if part.source
        for key, tensor in part.component.state_dict().items()
    }


def load_image_file(file: Path, rng: random.Random) -> Tensors:
    """Load an image file, or an error about it as that of a checkpoint; small ones only, so that memory is small."""
    with mock.patch.object(Image, "MAX_IMAGE_PIXELS", MAX_PIXELS):
        try:
            return {"pixels": torch.from_numpy(np.array(load_image(file)))}
        except InputError as error:
            raise CheckpointError(str(error), path=file) from error


def ways(file: Path, folder: Path) -> list[Callable[[random.Random], Tensors]]:
    """Return the ways to load something that includes `file`, likelier ones repeated."""
    layout, pipeline = file.relative_to(folder).parts[0], folder / "pipeline"
    if layout == "images":
        return [partial(load_image_file, file)]
    if layout == "original":
        return [lambda rng: read_checkpoint(file)[0], partial(load_single, file), partial(convert_dry, file)]
    if layout == "single":
        return [*5 * [partial(load_single, file)], partial(convert_dry, file)]
    if layout == "pipeline":
        intact = folder / "single" / "imvar" / "model.safetensors"
        only = {"part": file.parent.name} if file.parent.name in OPTIONS["part"] else {}
        return [
            *6 * [partial(load_pipeline, file)],
            partial(load_single, intact, config=pipeline),
            partial(convert_dry, pipeline, **only),
            partial(convert_dry, intact, fill=pipeline),
            partial(convert_dry, intact, config=pipeline, **only),
        ]
    single = [] if file.suffix == ".json" else [partial(load_single, file)]
    return [*6 * [partial(load_part, file.parent)], partial(convert_dry, file.parent), *single]


# One case


def load(way: Callable[[random.Random], Tensors], rng: random.Random) -> None:
    """Load, and read every value."""
    with warnings.catch_warnings(action="ignore"):
        tensors = way(rng)
    for key, tensor in tensors.items():
        assert tensor.device.type == "cpu", key
        float(tensor.double().sum()) if not tensor.is_complex() else None


def run_case(number: int, seed: int, folder: Path, groups: list[list[Path]]) -> tuple[str, str]:
    """Corrupt one of these files and load what it belongs to; return the outcome and the corruption.

    Any outcome except "loaded" and "refused" is a fault.
    """
    rng = random.Random(f"{seed} {number}")
    file = rng.choice(rng.choice(groups))
    content, before = file.read_bytes(), peak_memory()
    cpu_start, start = time.process_time(), time.perf_counter()
    gc.disable()  # a collection scans everything loaded before and would count as time of this case
    corruption = f"{file.relative_to(folder)}: {corrupt(file, rng)}"
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
    cpu, wall = time.process_time() - cpu_start, time.perf_counter() - start
    if cpu > MAX_SECONDS or wall > 5 * MAX_SECONDS:  # CPU time does not depend on the load of the machine
        outcome = f"SLOW {cpu:.1f} s of {wall:.1f} s, {outcome}"
    if (grown := peak_memory() - before) > MAX_MEGABYTES * 1000:
        outcome = f"LARGE {grown / 1000:.0f} MB, {outcome}"
    return outcome, corruption


def warm_up(folder: Path) -> None:
    """Load intact files in every way, so that one-time work of the libraries is not charged to a case."""
    for file in (
        folder / "pipeline" / "model_index.json",
        folder / "single" / "full" / "model.ckpt",
        *folder.glob("bin/*/*.bin"),
    ):
        for way in ways(file, folder):
            with suppress(CheckpointError):  # not every random option fits
                load(way, random.Random(0))


def peak_memory() -> int:
    """Return the peak memory of this process in kB; the files themselves are negligible."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
