"""The benchmark cases: each runs the same job in diffusers and in imvar."""

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
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import imvar
from imvar.pipeline.image_variation import decode_with
from imvar.runtime.compiled import Compiler
from imvar.runtime.precompute import PrecomputedUNet, Runner

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
LEVELS: dict[str, dict[str, str]] = {  # of speed on a GPU: options of pipe.compile, the quickest to compile first
    "cudagraphs": {"backend": "cudagraphs"},
    "default": {},
    "max-autotune": {"mode": "max-autotune"},
}
EAGER = "eager"
PHOTO = Path(__file__).resolve().parents[2] / "tests" / "photos" / "chelsea.jpg"
GUIDANCE = 3.0
STEP = 7  # of those that a step is timed at


@dataclass(frozen=True)
class Case:
    """The same job in both libraries. `seconds` times a call, by default with CUDA events or the wall clock."""

    name: str
    diffusers: Callable[[], Any]
    imvar: Callable[[], Any]
    seconds: Callable[[Callable[[], Any]], float] | None = None
    keeps_memory: bool = False  # measure the memory of the result rather than the peak of the call


class Libraries:
    """Components of one checkpoint as both libraries load them, cached."""

    def __init__(self, folder: Path, args: argparse.Namespace, dtype: str, rounded: str = ""):
        self.folder, self.args = folder, args
        self.device, self.dtype = args.device, DTYPES[dtype]
        self.rounded = DTYPES[rounded or dtype]  # the dtype to which the values of inputs are rounded
        config = json.loads((folder / "unet" / "config.json").read_text())
        self.width = config["cross_attention_dim"]
        self.size = args.size or 8 * config["sample_size"]
        self.component = cache(self.load)

    def load(self, name: str) -> tuple[Any, Any]:
        """Load a component, or the pipeline, with diffusers or transformers and with imvar."""
        import diffusers
        import transformers
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

        reference: Any = {
            "unet": diffusers.UNet2DConditionModel,
            "vae": diffusers.AutoencoderKL,
            "image_encoder": transformers.CLIPVisionModelWithProjection,
            "safety_checker": StableDiffusionSafetyChecker,
            "pipeline": diffusers.StableDiffusionImageVariationPipeline,
        }[name]
        own: Any = {
            "unet": imvar.UNet2DConditionModel,
            "vae": imvar.AutoencoderKL,
            "image_encoder": imvar.CLIPVisionModelWithProjection,
            "safety_checker": imvar.StableDiffusionSafetyChecker,
            "pipeline": imvar.StableDiffusionImageVariationPipeline,
        }[name]
        silence()
        folder = self.folder if name == "pipeline" else self.folder / name
        both = [cls.from_pretrained(folder, torch_dtype=self.dtype).to(self.device) for cls in (reference, own)]
        is_pipeline = name == "pipeline"
        if is_pipeline:
            for pipe in both:
                pipe.set_progress_bar_config(disable=True)
                for thresholds in "concept_embeds_weights", "special_care_embeds_weights":  # flag nothing
                    getattr(pipe.safety_checker, thresholds).data.fill_(2.0)
        if self.args.reference != EAGER:
            for model in [both[0].unet, both[0].vae] if is_pipeline else [both[0]]:
                compile_diffusers(model, self.args.reference)
        if self.args.compile != EAGER and is_pipeline:
            both[1].compile(**LEVELS[self.args.compile])
        return both[0], both[1]

    def runner(self, level: str = "") -> Runner:
        """Return how imvar's models are run, by default at the level of --compile."""
        level = level or self.args.compile
        return partial if level == EAGER else Compiler(**LEVELS[level])

    def forget(self) -> None:
        self.component = cache(self.load)
        gc.collect()

    def noise(self, *shape: int, seed: int = 0) -> Tensor:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return noise.to(self.rounded).to(self.device, self.dtype)


def silence() -> None:
    """Turn off the messages and progress bars of diffusers and transformers."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def pipeline_class(library: str) -> Any:
    return import_module(library).StableDiffusionImageVariationPipeline


def compile_diffusers(model: Any, mode: str) -> None:
    """Apply what the diffusers documentation recommends: channels_last, fused projections, torch.compile."""
    model.to(memory_format=torch.channels_last)
    if hasattr(model, "fuse_qkv_projections"):
        model.fuse_qkv_projections()
    name = "decode" if hasattr(model, "decode") else "forward"
    setattr(model, name, torch.compile(getattr(model, name), mode=mode, fullgraph=True))


def step_inputs(libraries: Libraries, batch: int, size: int, steps: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents (b, 4, h, w), timesteps (steps,), and the context (2 b, 1, c) of both halves of guidance."""
    side = size // 8
    x, embeds = libraries.noise(batch, 4, side, side), libraries.noise(batch, 1, libraries.width, seed=1)
    times = torch.linspace(981, 1, steps, device=libraries.device).long()
    return x, times, torch.cat([torch.zeros_like(embeds), embeds])


def guided(both: Tensor) -> Tensor:
    uncond, cond = both.chunk(2)
    return uncond + GUIDANCE * (cond - uncond)


def predict_noise(unet: Any, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
    """Call the UNet of diffusers."""
    return unet(x, time, encoder_hidden_states=context, return_dict=False)[0]


def guided_step(libraries: Libraries, batch: int, size: int, steps: int = 50) -> Case:
    """One guided denoising step. imvar precomputes before it is timed, as before the loop."""
    reference, unet = libraries.component("unet")
    x, times, context = step_inputs(libraries, batch, size, steps)
    prepared = PrecomputedUNet(unet, times, context, libraries.runner())
    return Case(
        f"unet, guided step, {batch} x {size} px",
        lambda: guided(predict_noise(reference, torch.cat([x, x]), times[STEP], context)),
        lambda: guided(prepared(x, STEP)),
    )


def unet(libraries: Libraries) -> Iterator[Case]:
    yield guided_step(libraries, libraries.args.batch, libraries.size)


def scaling(libraries: Libraries) -> Iterator[Case]:
    """Steps with larger batches, up to `--largest`, and larger images; then runs with more steps."""
    for batch, larger in (1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (32, 1), (1, 1.5), (1, 2):
        if batch <= libraries.args.largest:
            yield guided_step(libraries, batch, int(larger * libraries.size))
    for steps in sorted({max(libraries.args.steps // part, 1) for part in (4, 2, 1)}):
        yield pipeline_run(libraries, libraries.args.batch, libraries.size, steps)


def latents_to_decode(libraries: Libraries) -> Tensor:
    return libraries.noise(libraries.args.batch, 4, libraries.size // 8, libraries.size // 8)


def vae(libraries: Libraries) -> Iterator[Case]:
    reference, model = libraries.component("vae")
    z = latents_to_decode(libraries)
    run_decode = libraries.runner()(decode_with, model)
    yield Case(
        f"vae, decode, {libraries.args.batch} x {libraries.size} px",
        lambda: decode_with(reference, z),
        lambda: run_decode(z),
    )


def clip(libraries: Libraries) -> Iterator[Case]:
    reference, encoder = libraries.component("image_encoder")
    side = reference.config.image_size
    pixels = libraries.noise(libraries.args.batch, 3, side, side)
    yield Case(
        f"clip, {libraries.args.batch} x {side} px",
        lambda: reference(pixels).image_embeds,
        lambda: encoder(pixels).image_embeds,
    )


def safety(libraries: Libraries) -> Iterator[Case]:
    """A call of the safety checker; its image embeddings are compared."""
    reference, checker = libraries.component("safety_checker")
    side = checker.config.vision_config.image_size
    pixels, images = (
        libraries.noise(libraries.args.batch, 3, side, side),
        libraries.noise(libraries.args.batch, 3, 64, 64, seed=1),
    )

    def check(checker: Any, projection: torch.nn.Module) -> Callable[[], Tensor]:
        embeddings: list[Tensor] = []
        projection.register_forward_hook(lambda _, __, embeds: embeddings.append(embeds))

        def run() -> Tensor:
            checker(clip_input=pixels, images=images.clone())
            return embeddings.pop()

        return run

    yield Case(
        f"safety, {libraries.args.batch} x {side} px",
        check(reference, reference.visual_projection),
        check(checker, checker.visual_projection),
    )


def run_pipeline(pipe: Any, size: int | None, steps: int, batch: int) -> Tensor:
    """Return images (b, h, w, 3) of a photo, made with the safety checker."""
    images = pipe(
        Image.open(PHOTO).convert("RGB"),
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        num_images_per_prompt=batch,
        generator=torch.Generator().manual_seed(0),
    ).images
    return torch.stack([torch.from_numpy(np.array(image)).float() for image in images])


def pipeline_run(libraries: Libraries, batch: int, size: int, steps: int) -> Case:
    """A call of the pipeline with a photo, including the safety checker."""
    reference, own = (partial(run_pipeline, pipe, size, steps, batch) for pipe in libraries.component("pipeline"))
    return Case(f"pipeline, {batch} x {size} px, {steps} steps", reference, own)


def pipeline(libraries: Libraries) -> Iterator[Case]:
    yield pipeline_run(libraries, libraries.args.batch, libraries.size, libraries.args.steps)


def child_cpu_seconds(run: Callable[[], Any]) -> float:
    """Return the CPU seconds of the child processes that `run` starts."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    run()
    return spent() - before


def process(*lines: str) -> Callable[[], None]:
    def run() -> None:
        subprocess.run([sys.executable, "-c", "; ".join(lines)], check=True, capture_output=True)

    return run


def load(libraries: Libraries) -> Iterator[Case]:
    """`from_pretrained` of the pipeline, without imports."""
    silence()

    def run(cls: Any) -> Callable[[], None]:
        return lambda: cls.from_pretrained(libraries.folder, torch_dtype=libraries.dtype)

    yield Case(
        "load; private memory",
        run(pipeline_class("diffusers")),
        run(pipeline_class("imvar")),
        keeps_memory=True,
    )


def imports(libraries: Libraries) -> Iterator[Case]:
    """CPU time of a process that imports the pipeline; then imvar's against one that imports only torch."""
    own = process("from imvar import StableDiffusionImageVariationPipeline")
    yield Case(
        "import, CPU", process("from diffusers import StableDiffusionImageVariationPipeline"), own, child_cpu_seconds
    )
    yield Case("import, CPU; only torch in place of diffusers", process("import torch"), own, child_cpu_seconds)


CASES: dict[str, Callable[[Libraries], Iterator[Case]]] = {
    "unet": unet,
    "vae": vae,
    "clip": clip,
    "safety": safety,
    "pipeline": pipeline,
    "load": load,
    "import": imports,
    "scaling": scaling,
}
