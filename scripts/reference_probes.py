"""The runs that `verify_reference.py` compares: each takes a component of either library and returns named outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

Outputs = dict[str, Tensor]
PHOTOS = sorted((Path(__file__).resolve().parents[1] / "tests" / "photos").glob("*.jpg"))
GUIDANCE = 3.0  # as the published card suggests


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def open_photo(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def run_feature_extractor(extractor: Any) -> Outputs:
    return {f"pixels of {path.name}": extractor(open_photo(path), return_tensors="pt").pixel_values for path in PHOTOS}


def run_image_encoder(encoder: Any, pixels: Tensor) -> Outputs:
    output = encoder(pixels)
    return {"embeddings": output.image_embeds, "last hidden state": output.last_hidden_state}


def encode_and_decode(vae: Any, image: Tensor, latents: Tensor) -> Outputs:
    return {
        f"encode {image.shape[-1]} px, moments": vae.encode(image).latent_dist.parameters,
        f"decode {image.shape[-1]} px": vae.decode(latents).sample,
    }


def run_unet(unet: Any, latents: Tensor, width: int) -> Outputs:
    contexts = {"one token": noise(len(latents), 1, width, seed=1), "4 tokens": noise(len(latents), 4, width, seed=4)}
    return {
        f"{name}, batch of {len(latents)}, t = 500": unet(latents, 500, encoder_hidden_states=context).sample
        for name, context in contexts.items()
    }


def run_safety_checker(checker: Any, pixels: Tensor) -> Outputs:
    """Return cosines with the concepts, and flags by the file's thresholds and by two sets that separate the images."""
    projection, embeddings = checker.visual_projection, []
    hook = projection.register_forward_hook(lambda _, __, embeds: embeddings.append(embeds))

    def flags() -> Tensor:
        return torch.tensor(checker(clip_input=pixels, images=np.ones((len(pixels), 8, 8, 3)))[1])

    def flags_of_first_concepts(concept: float, special: float) -> Tensor:
        for name, threshold in ("concept_embeds_weights", concept), ("special_care_embeds_weights", special):
            out_of_reach = torch.full_like(getattr(checker, name), 2.0)
            setattr(checker, name, nn.Parameter(out_of_reach.index_fill(0, torch.tensor(0), threshold), False))
        return flags()

    outputs = {"flags, as the file has it": flags()}
    hook.remove()
    lists = checker.special_care_embeds, checker.concept_embeds
    special, concepts = (F.normalize(embeddings[0]) @ F.normalize(embeds).T for embeds in lists)
    midpoints = [(column.min() + column.max()).item() / 2 for column in (special[:, 0], concepts[:, 0])]
    hit = concepts[special[:, 0].argmax(), 0].item()
    return {
        "embeddings": embeddings[0],
        "cosines": torch.cat([special, concepts], 1),
        **outputs,
        "flags, threshold between the images": flags_of_first_concepts(midpoints[1], 2.0),
        "flags, by a special-care hit alone": flags_of_first_concepts(hit + 0.005, midpoints[0]),
    }


def run_scheduler(scheduler: Any, steps: int, shape: tuple[int, ...], **options: Any) -> Outputs:
    """Run all steps with random network outputs that depend slightly on the input."""
    if "eta" in options:
        options["generator"] = torch.Generator().manual_seed(1)
    scheduler.set_timesteps(steps)
    x, samples = noise(1, *shape, seed=0) * scheduler.init_noise_sigma, {}
    for i, t in enumerate(scheduler.timesteps):
        predicted = noise(*x.shape, seed=i) + 0.1 * scheduler.scale_model_input(x, t)
        samples[str(i)] = x = scheduler.step(predicted, t, x, **options).prev_sample
    return {"timesteps": scheduler.timesteps.clone()} | samples


def run_pipeline(pipe: Any, image: Image.Image, steps: int) -> Outputs:
    """Run the pipeline for a few steps through its public face."""
    pipe.set_progress_bar_config(disable=True)
    latents: list[Tensor] = []
    images, flags = pipe(
        image,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        return_dict=False,
        callback=lambda i, t, x: latents.append(x.clone()),
    )
    levels = np.stack([np.asarray(image) for image in pipe.numpy_to_pil(images)])
    return {
        "latents": latents[-1],
        "image in [0, 1]": torch.from_numpy(images),
        "PIL levels": torch.from_numpy(levels),
        "flags": torch.tensor(flags),
    }
