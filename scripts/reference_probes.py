"""What `verify_reference.py` asks each part, of either library: inputs from seeds and photographs, answers by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

Answers = dict[str, Tensor]
PHOTOS = sorted((Path(__file__).resolve().parents[1] / "tests" / "photos").glob("*.jpg"))
GUIDANCE = 3.0  # as the published card suggests


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def photograph(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def see(extractor: Any) -> Answers:
    return {f"pixels of {path.name}": extractor(photograph(path), return_tensors="pt").pixel_values for path in PHOTOS}


def embed(encoder: Any, pixels: Tensor) -> Answers:
    output = encoder(pixels)
    return {"embeddings": output.image_embeds, "last hidden state": output.last_hidden_state}


def there_and_back(vae: Any, picture: Tensor, latents: Tensor) -> Answers:
    return {
        f"encode {picture.shape[-1]} px, moments": vae.encode(picture).latent_dist.parameters,
        f"decode {picture.shape[-1]} px": vae.decode(latents).sample,
    }


def predict(unet: Any, latents: Tensor, width: int) -> Answers:
    contexts = {"one token": noise(len(latents), 1, width, seed=1), "4 tokens": noise(len(latents), 4, width, seed=4)}
    return {
        f"{what}, batch of {len(latents)}, t = 500": unet(latents, 500, encoder_hidden_states=context).sample
        for what, context in contexts.items()
    }


def judge(checker: Any, pixels: Tensor) -> Answers:
    """Cosines with the concepts, and flags: by the file's thresholds, and by two sets that tell the pictures apart."""
    projection, seen = getattr(checker, "proj", None) or checker.visual_projection, []
    hook = projection.register_forward_hook(lambda _, __, embeds: seen.append(embeds))

    def flags() -> Tensor:
        return torch.tensor(checker(clip_input=pixels, images=np.ones((len(pixels), 8, 8, 3)))[1])

    def only_first(concept: float, special: float) -> Tensor:
        for name, threshold in ("concept_embeds_weights", concept), ("special_care_embeds_weights", special):
            out_of_reach = torch.full_like(getattr(checker, name), 2.0)
            setattr(checker, name, nn.Parameter(out_of_reach.index_fill(0, torch.tensor(0), threshold), False))
        return flags()

    answers = {"flags, as the file has it": flags()}
    hook.remove()
    lists = checker.special_care_embeds, checker.concept_embeds
    special, concepts = (F.normalize(seen[0]) @ F.normalize(embeds).T for embeds in lists)
    between = [(column.min() + column.max()).item() / 2 for column in (special[:, 0], concepts[:, 0])]
    hit = concepts[special[:, 0].argmax(), 0].item()
    return {
        "embeddings": seen[0],
        "cosines": torch.cat([special, concepts], 1),
        **answers,
        "flags, threshold between the pictures": only_first(between[1], 2.0),
        "flags, by a special-care hit alone": only_first(hit + 0.005, between[0]),
    }


def walk(scheduler: Any, steps: int, shape: tuple[int, ...], **options: Any) -> Answers:
    """A whole run with random network outputs that depend a little on the question."""
    if "eta" in options:
        options["generator"] = torch.Generator().manual_seed(1)
    scheduler.set_timesteps(steps)
    x, after = noise(1, *shape, seed=0) * scheduler.init_noise_sigma, {}
    for i, t in enumerate(scheduler.timesteps):
        predicted = noise(*x.shape, seed=i) + 0.1 * scheduler.scale_model_input(x, t)
        after[str(i)] = x = scheduler.step(predicted, t, x, **options).prev_sample
    return {"timesteps": scheduler.timesteps.clone()} | after


def vary(pipe: Any, picture: Image.Image, steps: int) -> Answers:
    """A short run as the pipeline's user makes it."""
    pipe.set_progress_bar_config(disable=True)
    latents: list[Tensor] = []
    images, flags = pipe(
        picture,
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
        "picture in [0, 1]": torch.from_numpy(images),
        "PIL levels": torch.from_numpy(levels),
        "flags": torch.tensor(flags),
    }
