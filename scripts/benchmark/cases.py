"""What is timed: each case is the same job for diffusers and for imvar."""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import imvar
from imvar.pipeline.steps import decode
from imvar.runtime.compiled import Compiler
from imvar.runtime.precompute import PrecomputedUNet, Runner

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PHOTO = Path(__file__).resolve().parents[2] / "tests" / "photos" / "chelsea.jpg"
GUIDANCE = 3.0


@dataclass(frozen=True)
class Case:
    """The same job twice. `seconds`: how long a call took, if not by the device's clock or the wall's."""

    name: str
    theirs: Callable[[], Any]
    ours: Callable[[], Any]
    seconds: Callable[[Callable[[], Any]], float] | None = None
    makes: bool = False  # something, whose own memory is to be told, rather than the most that was needed to make it


class Sides:
    """Both libraries' parts of one checkpoint, loaded when they are asked for."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder, self.args = folder, args
        self.device, self.dtype = args.device, DTYPES[args.dtype]
        config = json.loads((folder / "unet" / "config.json").read_text())
        self.width = config["cross_attention_dim"]
        self.size = args.size or 8 * config["sample_size"]
        self.part = cache(self.load)

    def load(self, name: str) -> tuple[Any, Any]:
        """A part as diffusers or transformers has it, and as imvar has it."""
        import diffusers
        import transformers
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

        theirs: Any = {
            "unet": diffusers.UNet2DConditionModel,
            "vae": diffusers.AutoencoderKL,
            "image_encoder": transformers.CLIPVisionModelWithProjection,
            "safety_checker": StableDiffusionSafetyChecker,
            "pipeline": diffusers.StableDiffusionImageVariationPipeline,
        }[name]
        ours: Any = {
            "unet": imvar.UNet2DConditionModel,
            "vae": imvar.AutoencoderKL,
            "image_encoder": imvar.CLIPVisionModelWithProjection,
            "safety_checker": imvar.StableDiffusionSafetyChecker,
            "pipeline": imvar.StableDiffusionImageVariationPipeline,
        }[name]
        quiet(diffusers, transformers)
        where = self.folder if name == "pipeline" else self.folder / name
        both = [kind.from_pretrained(where, torch_dtype=self.dtype).to(self.device) for kind in (theirs, ours)]
        whole = name == "pipeline"
        if whole:
            for pipe in both:
                pipe.set_progress_bar_config(disable=True)
                for thresholds in "concept_embeds_weights", "special_care_embeds_weights":  # nothing is made black
                    getattr(pipe.safety_checker, thresholds).data.fill_(2.0)
        if self.args.rival == "compiled":
            for model in [both[0].unet, both[0].vae] if whole else [both[0]]:
                fastest(model)
        if self.args.compile and whole:
            both[1].compile(mode=self.args.compile)
        return both[0], both[1]

    def runner(self) -> Runner:
        """How functions of imvar's models are run."""
        return Compiler(mode=self.args.compile) if self.args.compile else partial

    def forget(self) -> None:
        self.part = cache(self.load)
        gc.collect()

    def noise(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device, self.dtype)


def quiet(*libraries: Any) -> None:
    for library in libraries:
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def fastest(model: Any) -> None:
    """diffusers' advice for speed: channels_last, fused projections, and `torch.compile` with autotuning."""
    model.to(memory_format=torch.channels_last)
    if hasattr(model, "fuse_qkv_projections"):
        model.fuse_qkv_projections()
    name = "decode" if hasattr(model, "decode") else "forward"
    setattr(model, name, torch.compile(getattr(model, name), mode="max-autotune", fullgraph=True))


def guided_step(sides: Sides, batch: int, size: int, steps: int = 50) -> Case:
    """One prediction under guidance, as in the loop; what imvar makes ready before its loop is made before."""
    theirs, ours = sides.part("unet")
    side = size // 8
    x, embeds = sides.noise(batch, 4, side, side), sides.noise(batch, 1, sides.width, seed=1)
    context = torch.cat([torch.zeros_like(embeds), embeds])
    times = torch.linspace(981, 1, steps, device=sides.device).long()
    prepared = PrecomputedUNet(ours, times, context, sides.runner())

    def guided(both: Tensor) -> Tensor:
        uncond, cond = both.chunk(2)
        return uncond + GUIDANCE * (cond - uncond)

    return Case(
        f"unet, guided step, {batch} x {size} px",
        lambda: guided(theirs(torch.cat([x, x]), times[7], encoder_hidden_states=context).sample),
        lambda: guided(prepared(x, 7)),
    )


def unet(sides: Sides) -> Iterator[Case]:
    yield guided_step(sides, sides.args.batch, sides.size)


def scaling(sides: Sides) -> Iterator[Case]:
    """Steps of more and of larger pictures, as far as `--largest` batch goes; then runs of more steps."""
    for batch, larger in (1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (32, 1), (1, 1.5), (1, 2):
        if batch <= sides.args.largest:
            yield guided_step(sides, batch, int(larger * sides.size))
    for steps in sorted({max(sides.args.steps // part, 1) for part in (4, 2, 1)}):
        yield job(sides, sides.args.batch, sides.size, steps)


def vae(sides: Sides) -> Iterator[Case]:
    theirs, ours = sides.part("vae")
    z = sides.noise(sides.args.batch, 4, sides.size // 8, sides.size // 8)
    quick = sides.runner()(decode, ours)
    yield Case(f"vae, decode, {sides.args.batch} x {sides.size} px", lambda: theirs.decode(z).sample, lambda: quick(z))


def clip(sides: Sides) -> Iterator[Case]:
    theirs, ours = sides.part("image_encoder")
    side = theirs.config.image_size
    pixels = sides.noise(sides.args.batch, 3, side, side)
    yield Case(
        f"clip, {sides.args.batch} x {side} px", lambda: theirs(pixels).image_embeds, lambda: ours(pixels).image_embeds
    )


def safety(sides: Sides) -> Iterator[Case]:
    """The checker's whole call; what is compared is the embedding that it judges by."""
    theirs, ours = sides.part("safety_checker")
    side = ours.config.vision_config.image_size
    pixels, pictures = sides.noise(sides.args.batch, 3, side, side), sides.noise(sides.args.batch, 3, 64, 64, seed=1)

    def check(checker: Any, projection: torch.nn.Module) -> Callable[[], Tensor]:
        seen: list[Tensor] = []
        projection.register_forward_hook(lambda _, __, embeds: seen.append(embeds))

        def run() -> Tensor:
            checker(clip_input=pixels, images=pictures.clone())
            return seen.pop()

        return run

    yield Case(
        f"safety, {sides.args.batch} x {side} px", check(theirs, theirs.visual_projection), check(ours, ours.proj)
    )


def job(sides: Sides, batch: int, size: int, steps: int) -> Case:
    """The whole job, from a photograph to pictures that the safety checker has looked at."""
    photo, both = Image.open(PHOTO).convert("RGB"), sides.part("pipeline")

    def run(pipe: Any) -> Tensor:
        pictures = pipe(
            photo,
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            num_images_per_prompt=batch,
            generator=torch.Generator().manual_seed(0),
        ).images
        return torch.stack([torch.from_numpy(np.array(picture)).float() for picture in pictures])

    theirs, ours = (partial(run, pipe) for pipe in both)
    return Case(f"pipeline, {batch} x {size} px, {steps} steps", theirs, ours)


def pipeline(sides: Sides) -> Iterator[Case]:
    yield job(sides, sides.args.batch, sides.size, sides.args.steps)


def of_children(run: Callable[[], Any]) -> float:
    """Seconds of processor time that the processes which `run` started took."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    begun = spent()
    run()
    return spent() - begun


def process(*lines: str) -> Callable[[], None]:
    def run() -> None:
        subprocess.run([sys.executable, "-c", "; ".join(lines)], check=True, capture_output=True)

    return run


def load(sides: Sides) -> Iterator[Case]:
    """`from_pretrained` of the whole pipeline, its import not counted."""
    import diffusers
    import transformers

    quiet(diffusers, transformers)

    def run(kind: Any) -> Callable[[], None]:
        return lambda: kind.from_pretrained(sides.folder, torch_dtype=sides.dtype)

    yield Case(
        "load; private memory",
        run(diffusers.StableDiffusionImageVariationPipeline),
        run(imvar.StableDiffusionImageVariationPipeline),
        makes=True,
    )


def imports(sides: Sides) -> Iterator[Case]:
    """Processor time of a process that imports the pipeline, and beside imvar's of one that imports torch alone."""
    ours = process("from imvar import StableDiffusionImageVariationPipeline")
    yield Case("import, CPU", process("from diffusers import StableDiffusionImageVariationPipeline"), ours, of_children)
    yield Case("import, CPU, on the left torch alone", process("import torch"), ours, of_children)


CASES: dict[str, Callable[[Sides], Iterator[Case]]] = {
    "unet": unet,
    "vae": vae,
    "clip": clip,
    "safety": safety,
    "pipeline": pipeline,
    "load": load,
    "import": imports,
    "scaling": scaling,
}
