"""What is timed: each case is the same job for diffusers and for imvar."""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import imvar
from imvar.models.prepared import Prepared

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PHOTO = Path(__file__).resolve().parents[2] / "tests" / "photos" / "chelsea.jpg"
GUIDANCE = 3.0


@dataclass(frozen=True)
class Case:
    name: str
    theirs: Callable[[], Any]
    ours: Callable[[], Any]


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

        theirs: Any = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL,
                       "image_encoder": transformers.CLIPVisionModelWithProjection,
                       "safety_checker": StableDiffusionSafetyChecker,
                       "pipeline": diffusers.StableDiffusionImageVariationPipeline}[name]
        ours: Any = {"unet": imvar.UNet2DConditionModel, "vae": imvar.AutoencoderKL,
                     "image_encoder": imvar.CLIPVisionModelWithProjection,
                     "safety_checker": imvar.StableDiffusionSafetyChecker,
                     "pipeline": imvar.StableDiffusionImageVariationPipeline}[name]
        quiet(diffusers, transformers)
        where = self.folder if name == "pipeline" else self.folder / name
        both = [kind.from_pretrained(where, torch_dtype=self.dtype).to(self.device) for kind in (theirs, ours)]
        whole = name == "pipeline"
        if whole:
            for pipe in both:
                pipe.set_progress_bar_config(disable=True)
                for thresholds in "concept_embeds_weights", "special_care_embeds_weights":  # nothing is made black
                    getattr(pipe.safety_checker, thresholds).data.fill_(2.0)
        if self.args.compile:
            for model in [both[0].unet, both[0].vae] if whole else [both[0]]:
                fastest(model)
        return both[0], both[1]

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
    prepared = Prepared(ours, times, context)

    def guided(both: Tensor) -> Tensor:
        uncond, cond = both.chunk(2)
        return uncond + GUIDANCE * (cond - uncond)

    return Case(f"unet, guided step, {batch} x {size} px",
                lambda: guided(theirs(torch.cat([x, x]), times[7], encoder_hidden_states=context).sample),
                lambda: guided(prepared(x, 7)))


def unet(sides: Sides) -> Iterator[Case]:
    yield guided_step(sides, sides.args.batch, sides.size)


def scaling(sides: Sides) -> Iterator[Case]:
    for batch, size in (1, 512), (2, 512), (4, 512), (8, 512), (16, 512), (32, 512), (1, 768), (1, 1024):
        yield guided_step(sides, batch, size)


def vae(sides: Sides) -> Iterator[Case]:
    theirs, ours = sides.part("vae")
    z = sides.noise(sides.args.batch, 4, sides.size // 8, sides.size // 8)
    yield Case(f"vae, decode, {sides.args.batch} x {sides.size} px", lambda: theirs.decode(z).sample,
               lambda: ours.decode(z).sample)


def clip(sides: Sides) -> Iterator[Case]:
    theirs, ours = sides.part("image_encoder")
    side = theirs.config.image_size
    pixels = sides.noise(sides.args.batch, 3, side, side)
    yield Case(f"clip, {sides.args.batch} x {side} px", lambda: theirs(pixels).image_embeds,
               lambda: ours(pixels).image_embeds)


def safety(sides: Sides) -> Iterator[Case]:
    theirs, ours = sides.part("safety_checker")
    side = ours.config.vision_config.image_size
    pixels, pictures = sides.noise(sides.args.batch, 3, side, side), sides.noise(sides.args.batch, 3, 64, 64, seed=1)
    yield Case(f"safety, {sides.args.batch} x {side} px", lambda: theirs(pixels, pictures.clone())[0],
               lambda: ours(pixels, pictures.clone())[0])


def pipeline(sides: Sides) -> Iterator[Case]:
    theirs, ours = sides.part("pipeline")
    photo, args = Image.open(PHOTO).convert("RGB"), sides.args

    def whole(pipe: Any) -> Tensor:
        return pipe(photo, height=sides.size, width=sides.size, num_inference_steps=args.steps, output_type="pt",
                    guidance_scale=GUIDANCE, num_images_per_prompt=args.batch,
                    generator=torch.Generator().manual_seed(0)).images

    def theirs_as_tensor() -> Tensor:
        return torch.as_tensor(whole(theirs))

    yield Case(f"pipeline, {args.batch} x {sides.size} px, {args.steps} steps", theirs_as_tensor, lambda: whole(ours))


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
        return lambda: kind.from_pretrained(sides.folder, torch_dtype=sides.dtype) and None

    yield Case("load", run(diffusers.StableDiffusionImageVariationPipeline),
               run(imvar.StableDiffusionImageVariationPipeline))


def imports(sides: Sides) -> Iterator[Case]:
    """A process that imports the pipeline, and beside imvar's one that imports torch alone."""
    ours = process("from imvar import StableDiffusionImageVariationPipeline")
    yield Case("import", process("from diffusers import StableDiffusionImageVariationPipeline"), ours)
    yield Case("import, on the left torch alone", process("import torch"), ours)


CASES: dict[str, Callable[[Sides], Iterator[Case]]] = {
    "unet": unet, "vae": vae, "clip": clip, "safety": safety, "pipeline": pipeline, "load": load, "import": imports,
    "scaling": scaling,
}
