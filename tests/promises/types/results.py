"""The types of results, one by one: checked by mypy and pyright, not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import numpy as np
from PIL.Image import Image
from torch import Tensor

import imvar
from imvar import StableDiffusionImageVariationPipeline, StableDiffusionPipelineOutput, UNet2DConditionModel

Flags = list[bool] | None


class Fork(StableDiffusionImageVariationPipeline):
    pass


def calls(pipe: StableDiffusionImageVariationPipeline, photo: Image, kind: str, as_dict: bool) -> None:
    assert_type(pipe(photo), StableDiffusionPipelineOutput[list[Image]])
    assert_type(pipe(image=photo, return_dict=True, output_type="pil"), StableDiffusionPipelineOutput)
    assert_type(pipe(photo, output_type="np"), StableDiffusionPipelineOutput[np.ndarray])
    assert_type(pipe(photo, output_type="pt"), StableDiffusionPipelineOutput[Tensor])
    assert_type(pipe(photo, output_type="latent"), StableDiffusionPipelineOutput[Tensor])
    assert_type(pipe(photo, return_dict=False), tuple[list[Image], Flags])
    assert_type(pipe(photo, return_dict=False, output_type="np"), tuple[np.ndarray, Flags])
    assert_type(pipe(photo, return_dict=False, output_type="latent"), tuple[Tensor, Flags])
    assert_type(pipe(photo, output_type=kind, return_dict=as_dict), Any)
    assert_type(pipe(photo, 512, 512, 50, 3.0, seed=0), Any)


def wrong_calls(pipe: StableDiffusionImageVariationPipeline, photo: Image) -> None:
    pipe(photo, gidance_scale=3)  # type: ignore[call-overload]
    pipe(photo, num_inference_steps="20")  # type: ignore[call-overload]
    print(pipe(photo, return_dict=False).images)  # type: ignore[attr-defined]


def show(made: StableDiffusionPipelineOutput) -> None:
    for image in made.images:
        image.show()


def loading(path: Path) -> None:
    assert_type(Fork.from_pretrained(path), Fork)
    assert_type(Fork.from_single_file(path).to("cpu"), Fork)
    assert_type(UNet2DConditionModel.from_pretrained(path), UNet2DConditionModel)
    assert_type(UNet2DConditionModel.from_single_file(path), UNet2DConditionModel)
    assert_type(imvar.DDIMScheduler.from_pretrained(path), imvar.DDIMScheduler)
    assert_type(imvar.DDIMScheduler.from_config({}), imvar.DDIMScheduler)
    assert_type(imvar.load_image(path), Image)
    assert_type(imvar.make_image_grid([imvar.load_image(path)], 1, 1), Image)


def methods(pipe: Fork, photo: Image, other: Any) -> None:
    show(pipe(photo))
    embeds = assert_type(pipe.encode_image(photo), Tensor)
    assert_type(imvar.mix([(embeds, 1.0)]), Tensor)
    assert_type(imvar.slerp(embeds, embeds, 0.5), Tensor)
    assert_type(pipe.preview(embeds), list[Image])
    assert_type(pipe.unet, UNet2DConditionModel)
    assert_type(pipe.vae, imvar.AutoencoderKL)
    assert_type(pipe.feature_extractor, imvar.CLIPImageProcessor | None)
    pipe.safety_checker = None
    pipe.unet = other
