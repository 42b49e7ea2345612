"""Callbacks: their checks, and the tensors that go into one and come out of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checks import check_floating, check_has_data
from ..errors import InputError, InputTypeError, describe, invalid, short_repr

TENSOR_INPUTS = ("latents", "pred_original_sample", "image_embeds", "negative_image_embeds")
"""What a `callback_on_step_end` can receive. It may change all but the second."""

DEFERRED = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction


def check_callback(callback: Any) -> None:
    """Check that a callback takes a step, a timestep and latents, and runs when it is called."""
    check_function("callback", callback, (0, 0, None), "a function (step, timestep, latents)")


def check_function(name: str, value: Any, arguments: tuple[Any, ...], expected: str) -> None:
    """Check that a function takes these positional arguments, and runs when it is called."""
    function = value
    while isinstance(function, partial):
        function = function.func
    try:
        fits = callable(function) and not any(kind(f) for kind in DEFERRED for f in (function, function.__call__))
        if fits:
            inspect.signature(value, follow_wrapped=False).bind(*arguments)
    except TypeError:
        fits = False
    except ValueError:  # functions written in C may have no signature
        return
    if not fits:
        raise invalid(InputTypeError, name, f"{expected}, neither async nor a generator", short_repr(value))


def check_callback_effects(name: str, returned: Any, latents: Tensor, shape: Sequence[int]) -> None:
    """Check that the callback of this name has run, by what it returned, and that its latents still have this shape."""
    if inspect.iscoroutine(returned) or inspect.isgenerator(returned) or inspect.isasyncgen(returned):
        got = f"one that returned a {describe(returned)}"
        raise invalid(InputTypeError, name, "a function that runs when it is called", got)
    if latents.shape != shape:
        raise invalid(InputError, name, f"latents of shape {tuple(shape)} after it", describe(latents))


def check_tensor_inputs(names: Any) -> list[str]:
    """Return the names of tensors for a `callback_on_step_end` as a list."""
    name = "callback_on_step_end_tensor_inputs"
    if not isinstance(names, (list, tuple)):
        raise invalid(InputTypeError, name, f"a list of names among {', '.join(TENSOR_INPUTS)}", short_repr(names))
    if unknown := [entry for entry in names if entry not in TENSOR_INPUTS]:
        hint = "to change guidance, pass a function as guidance_scale" if "prompt_embeds" in unknown else ""
        raise invalid(InputError, name, f"names among {', '.join(TENSOR_INPUTS)}", short_repr(unknown[0]), hint)
    return list(names)


@contextmanager
def refuse_new_guidance_scale(pipe: Any) -> Iterator[None]:
    """Raise `InputError` if the code within sets `pipe._guidance_scale`, which has an effect in diffusers alone."""
    missing = object()
    before = vars(pipe).get("_guidance_scale", missing)
    yield
    after = vars(pipe).get("_guidance_scale", missing)
    if after is before:
        return
    if before is missing:
        del pipe._guidance_scale
    else:
        pipe._guidance_scale = before
    expected, hint = "a function that leaves pipe._guidance_scale", "pass a function as guidance_scale"
    raise invalid(InputError, "callback_on_step_end", expected, f"one that set it to {short_repr(after)}", hint)


def step_tensor(name: Any, latents: Tensor, x0: Callable[[], Tensor], context: Tensor, is_guided: bool) -> Tensor:
    """Return the tensor of this name after a step. Raises `InputError` if there is none."""
    match name:
        case "latents":
            return latents
        case "pred_original_sample":
            return x0()
        case "image_embeds":
            return context.chunk(2)[1] if is_guided else context
        case "negative_image_embeds" if is_guided:
            return context.chunk(2)[0]
    expected = f"a dictionary of {', '.join(TENSOR_INPUTS)} from it, the last under guidance"
    raise invalid(InputError, "callback_on_step_end", expected, short_repr(name))


def changed_tensors(returned: Any, given: Mapping[str, Tensor], own: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Return the tensors that a `callback_on_step_end` changed, by name, in the dtype and on the device of `own(name)`.

    `returned`: what it returned; `given`: what it received, which it may have written into. Raises `InputError` for a
    name without a tensor or one that must not change, and for values that cannot be used.
    """
    if returned is not None and not isinstance(returned, Mapping):
        expected = "a function that returns a dictionary of tensors, or None"
        raise invalid(InputTypeError, "callback_on_step_end", expected, f"one that returned {describe(returned)}")
    changed = {}
    for name, value in (dict(given) | dict(returned or {})).items():
        like = own(name)
        if is_same(value, like):
            continue
        if name == "pred_original_sample":
            hint = "change latents instead"
            raise invalid(InputError, name, "the same values after callback_on_step_end", "others", hint)
        expected = f"finite floats of shape {tuple(like.shape)} from callback_on_step_end"
        check_floating(name, value, expected)
        check_has_data(name, value)
        if value.shape != like.shape:
            raise invalid(InputError, name, expected, describe(value))
        changed[name] = value.detach().to(like)
        if not changed[name].isfinite().all():
            raise invalid(InputError, name, expected, "NaN or infinite values")
    return changed


def is_same(value: Any, own: Tensor) -> bool:
    """Return whether a value is this tensor, or equal to it in everything; NaN equals NaN."""
    if value is own or not isinstance(value, Tensor):
        return value is own
    alike = (value.shape, value.dtype, value.device) == (own.shape, own.dtype, own.device)
    return alike and torch.allclose(value, own, rtol=0, atol=0, equal_nan=True)
