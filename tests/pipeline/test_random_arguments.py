"""Any mixture of arguments: valid ones run, all others are an error that names one of those at fault."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from imvar import DDIMScheduler, InputError, LMSDiscreteScheduler, PNDMScheduler
from tests.support.random_checkpoint import tiny_pipeline

NAN, INF = math.nan, math.inf
OTHERS = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.binary(max_size=2),
    st.sampled_from([[], {}, ()]),
    st.sampled_from([NAN, INF, -INF, 1e400, 2.5, -1, 10**30, object(), torch.ones(2), np.ones(2), print]),
)
HUGE = st.sampled_from([2**31, 2**63, 10**18, -(2**63)])
RGB = Image.new("RGB", (40, 30), "red")


def integers(low: int, high: int) -> Any:
    """Draw integers in range, of any type, and other values."""
    good = st.integers(low, high)
    return st.one_of(good, good, good.map(np.int64), HUGE, st.integers(low - 3, low - 1), OTHERS)


def is_int(value: Any, low: int, high: float) -> bool:
    if isinstance(value, torch.Tensor):
        return False
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and low <= int(value) <= high


def is_real(value: Any, low: float = -INF, high: float = INF) -> bool:
    ok = isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and abs(value) < 1e300
    return ok and math.isfinite(value) and low <= value <= high


def is_size(value: Any) -> bool:
    return value is None or (is_int(value, 8, 2**16) and int(value) % 8 == 0)


def is_seed(value: Any, images: int) -> bool:
    if isinstance(value, (list, tuple, range)):
        return len(value) == images and all(is_int(seed, 0, 2**63 - 1) for seed in value)
    return value is None or is_int(value, 0, 2**63 - images)


def is_interval(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(is_real(fraction, 0, 1) for fraction in value)
        and (value[0] <= value[1])
    )


def is_image(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.shape[-3:] == (3, 32, 32) and bool(value.isfinite().all())
    images = value if isinstance(value, (list, tuple)) else [value]
    return len(images) == 1 and isinstance(images[0], Image.Image) and images[0].mode != "F"


SIZES = st.one_of(st.sampled_from([None, 64, 72, np.int64(80)]), st.sampled_from([0, 7, 65, -64, 2**20]), OTHERS)
REALS = st.one_of(st.floats(-2, 9), st.integers(-1, 9), OTHERS)
TENSOR_INPUTS = "latents", "pred_original_sample", "image_embeds"


def falling(done: float) -> float:
    """A guidance scale from 3 down to 1."""
    return 3 - 2 * done


ARGUMENTS: dict[str, tuple[Any, Any]] = {  # strategy, and whether a value is valid
    "image": (
        st.one_of(
            st.sampled_from(
                [
                    RGB,
                    [RGB],
                    (RGB,),
                    RGB.convert("L"),
                    RGB.convert("P"),
                    torch.zeros(1, 3, 32, 32),
                    torch.zeros(3, 32, 32),
                ]
            ),
            st.sampled_from(
                [
                    [None],
                    ["x.png"],
                    "http://x",
                    RGB.convert("F"),
                    torch.zeros(1, 3, 32, 31),
                    torch.full((1, 3, 32, 32), NAN),
                    torch.zeros(1, 4, 32, 32),
                ]
            ),
            OTHERS,
        ),
        is_image,
    ),
    "height": (SIZES, is_size),
    "width": (SIZES, is_size),
    "num_inference_steps": (integers(1, 4), lambda v: is_int(v, 1, 1000)),
    "guidance_scale": (st.one_of(REALS, st.just(falling)), lambda v: v is falling or is_real(v, low=0)),
    "guidance_rescale": (st.one_of(st.floats(0, 1), REALS), lambda v: is_real(v, 0, 1)),
    "num_images_per_prompt": (integers(1, 2), lambda v: v is None or is_int(v, 1, 2**16)),
    "eta": (st.one_of(st.floats(0, 1), REALS), is_real),
    "seed": (st.one_of(st.integers(0, 2**63 - 9), st.sampled_from([[1], [1, 2], (3,), range(2)]), HUGE, OTHERS), None),
    "output_type": (
        st.one_of(st.sampled_from(["pil", "np", "pt", "latent"]), OTHERS),
        lambda v: isinstance(v, str) and v in ("pil", "np", "pt", "latent"),
    ),
    "return_dict": (st.one_of(st.booleans(), OTHERS), lambda v: isinstance(v, bool)),
    "callback": (st.one_of(st.none(), st.just(lambda *_: None), OTHERS), lambda v: v is None or callable(v)),
    "callback_steps": (integers(1, 3), lambda v: is_int(v, 1, INF)),
    "callback_on_step_end": (
        st.one_of(st.none(), st.just(lambda *_: {}), OTHERS),
        lambda v: v is None or callable(v),
    ),
    "callback_on_step_end_tensor_inputs": (
        st.one_of(st.sampled_from([TENSOR_INPUTS, ["latents"], ["latent"], "latents", [["latents"]]]), OTHERS),
        lambda v: isinstance(v, (list, tuple)) and all(name in TENSOR_INPUTS for name in v),
    ),
    "guidance_interval": (
        st.one_of(st.sampled_from([(0, 1), [0.2, 0.8], (1, 0), (0, NAN), (0,), (-1, 1), (0, "1")]), OTHERS),
        is_interval,
    ),
    "cache_interval": (integers(1, 3), lambda v: is_int(v, 1, INF)),
    "on_flagged": (
        st.one_of(st.sampled_from(["black", "blur", "keep", "raise"]), OTHERS),
        lambda v: isinstance(v, str) and v in ("black", "blur", "keep", "raise"),
    ),
}
NAMES = {"image": ("image", "pixel_values"), "num_inference_steps": ("num_inference_steps", "steps")}


class Hidden(tuple):
    """A tuple without contents in the report of a failing case."""

    def __repr__(self) -> str:
        return "..."


@pytest.fixture(scope="module")
def pipes():
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.steps = 0

    def count(*_: Any) -> None:
        pipe.steps += 1

    pipe.unet.register_forward_pre_hook(count)
    others = []
    for kind in (PNDMScheduler, DDIMScheduler, LMSDiscreteScheduler):
        other = tiny_pipeline()
        other.unet, other.vae = pipe.unet, pipe.vae
        other.scheduler = kind.from_config(pipe.scheduler.config)
        other.set_progress_bar_config(disable=True)
        others.append(other)
    return Hidden((pipe, others))


@given(
    names=st.sets(st.sampled_from(sorted(ARGUMENTS)), min_size=1, max_size=4), which=st.integers(0, 2), data=st.data()
)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_any_arguments(pipes, names, which, data):
    counter, pipe = pipes[0], pipes[1][which]
    options = {name: data.draw(ARGUMENTS[name][0], label=name) for name in sorted(names)}
    scale = options.get("guidance_scale", 3)
    if "guidance_interval" in options or (is_real(scale) and scale <= 1):
        options.pop("guidance_rescale", None)  # refused if no step is guided
    call = {"image": RGB, "num_inference_steps": 1, "output_type": "np"} | options
    wrong = {name for name, value in options.items() if ARGUMENTS[name][1] and not ARGUMENTS[name][1](value)}
    if not wrong & {"num_images_per_prompt", "image"}:
        images = int(call.get("num_images_per_prompt") or 1)
        wrong |= {"seed"} if not is_seed(call.get("seed"), images) else set()
    if which == 1 and not is_real(call.get("eta", 0), 0, 1):
        wrong.add("eta")
    if not (is_int(call.get("cache_interval", 1), 1, 1)):
        wrong.add("cache_interval")  # refused, as the UNet has a hook in this test
    if call.get("callback") is not None and call.get("callback_on_step_end") is not None:
        wrong.add("callback")
    steps = counter.steps
    if wrong:
        with pytest.raises(InputError) as caught:
            pipe(**call)
        assert any(word in str(caught.value) for name in wrong for word in NAMES.get(name, (name,)))
        assert len(str(caught.value)) < 1000
        assert counter.steps == steps
        return
    output = pipe(**call)
    images = output[0] if isinstance(output, tuple) else output.images
    assert len(images) == int(call.get("num_images_per_prompt") or 1)
    if isinstance(images, np.ndarray):
        assert images.shape[1:] == (int(call.get("height") or 128), int(call.get("width") or 128), 3)
    if isinstance(images, (np.ndarray, torch.Tensor)):
        assert bool(np.isfinite(np.asarray(images)).all())
    assert counter.steps > steps
