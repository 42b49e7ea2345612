"""Types of the keyword arguments of a call, for the overloads of `StableDiffusionImageVariationPipeline.__call__`.

Type checkers alone read this; `tests/promises/test_types.py` compares it with the signature of `__call__`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Required, TypedDict

import torch
from torch import Tensor

from .regions import Region


class CallOptions(TypedDict, total=False):
    """The arguments after `image` that have no effect on the type of the result."""

    height: int | None
    width: int | None
    num_inference_steps: int
    guidance_scale: float | Callable[[float], float]
    num_images_per_prompt: int | None
    eta: float
    generator: torch.Generator | list[torch.Generator] | None
    latents: Tensor | None
    callback: Callable[[int, Any, Tensor], Any] | None
    callback_steps: int
    guidance_interval: tuple[float, float]
    cache_interval: int
    seed: int | Sequence[int] | None
    on_flagged: str
    conditions: Mapping[str, Any] | None
    image_embeds: Tensor | Region | Sequence[Region] | None
    negative_image_embeds: Tensor | None
    guidance_rescale: float
    init_image: Any
    strength: float | None
    mask_image: Any
    paste: bool
    callback_on_step_end: Callable[[Any, int, Any, dict[str, Tensor]], Any] | None
    callback_on_step_end_tensor_inputs: Sequence[str]


class OutputOptions(CallOptions, total=False):
    """Those of a call that returns a `StableDiffusionPipelineOutput`."""

    return_dict: Literal[True]


class TupleOptions(CallOptions, total=False):
    """Those of a call that returns a tuple."""

    return_dict: Required[Literal[False]]


class AnyOptions(CallOptions, total=False):
    """Those of a call whose result has a type that is known when it runs."""

    output_type: str
    return_dict: bool
