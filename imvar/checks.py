"""Checks of arguments and config fields: numbers, paths, dtypes, devices and tensors.

Each takes the name of what it checks, for the error message.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import InputError, InputTypeError, describe, first_line, invalid, short_repr

MAX_WIDTH = 2**20  # channels and other widths: above any published model, and a product of three cannot overflow
MAX_BLOCKS = 16  # each halves height and width
MAX_SIDE = 2**15  # pixels
MAX_FLOAT = sys.float_info.max
FLOAT_DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64
TYPE_NAMES: dict[Any, str] = {bool: "True or False", str: "a string", os.PathLike: "a path", NoneType: "None"}

# Numbers


def check_int(name: str, value: Any, low: int = 1, high: float = math.inf) -> int:
    """Return an integer from `low` to `high` as an int."""
    number = as_number(value, operator.index)
    if number is None or not low <= number <= high:
        expected = f"an integer from {low} to {high}" if high < math.inf else f"an integer >= {low}"
        raise invalid(InputTypeError if number is None else InputError, name, expected, short_repr(value))
    return number


def check_float(name: str, value: Any, low: float = 0.0, high: float = 1.0) -> float:
    """Return a number from `low` to `high` as a float; NaN is rejected."""
    number = as_number(value)
    if number is None or not low <= number <= high:
        expected = "a finite number" if low == -MAX_FLOAT else f"a number from {low:g} to {high:g}"
        raise invalid(InputTypeError if number is None else InputError, name, expected, short_repr(value))
    return number


def check_finite(name: str, value: Any) -> float:
    """Return a finite number as a float."""
    return check_float(name, value, -MAX_FLOAT, MAX_FLOAT)


def as_number(value: Any, convert: Callable[[Any], Any] = float) -> Any:
    """Return a number of any type as `convert` returns it, float or an int; None if `value` is not such a number."""
    try:
        return None if is_bool(value) or isinstance(value, (str, bytes, bytearray)) else convert(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor on the meta device
        return None


def is_bool(value: Any) -> bool:
    """Return whether `value` is True or False, which Python counts as integers, or an array or tensor of them."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def check_ints(config: Any, *names: str, high: int = MAX_WIDTH) -> None:
    """Check config fields that are integers from 1 to `high`, or None where the field's type allows it."""
    for name in names:
        if (value := getattr(config, name)) is not None:
            check_int(name, value, high=high)


def check_block_channels(config: Any) -> None:
    """Check `block_out_channels`: one width per resolution."""
    widths = config.block_out_channels
    if not 1 <= len(widths) <= MAX_BLOCKS:
        raise invalid(InputError, "block_out_channels", f"1 to {MAX_BLOCKS} widths", str(len(widths)))
    for width in widths:
        check_int("block_out_channels", width, high=MAX_WIDTH)


def check_image_size(name: str, value: Any) -> None:
    """Check a size in pixels: one integer for a square, (height, width), or None for any size."""
    if value is None:
        return
    sides = value if isinstance(value, (list, tuple)) else (value, value)
    if len(sides) != 2:
        raise invalid(InputError, name, "an integer or (height, width)", short_repr(value))
    for side in sides:
        check_int(name, side, high=MAX_SIDE)


# Options, paths, dtypes and devices


def check_type(name: str, value: Any, *types: type) -> Any:
    """Return a value of one of these types, or None; a string such as "no" never passes for a bool."""
    if value is not None and not isinstance(value, types):
        raise invalid(InputTypeError, name, " or ".join(TYPE_NAMES[t] for t in types), short_repr(value))
    return value


def as_path(name: str, value: Any) -> Path:
    """Return a path argument as a `Path`; the file or folder need not exist."""
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise invalid(InputTypeError, name, "a path", short_repr(value))
    if not text or "\0" in text:
        raise invalid(InputError, name, "a path that is not empty and has no NUL character", short_repr(value))
    return Path(text)


Dtype = torch.dtype | Literal["auto"] | None
"""The dtype of loaded weights: this one, with "auto" the widest in the file that layers compute in, or with None each
tensor's own."""


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | Literal["auto"]:
    """Return a dtype given as such or by name, or `"auto"`; float32 for None."""
    if isinstance(dtype, str) and dtype == "auto":
        return "auto"
    if dtype is None:
        return torch.float32
    value = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(value, torch.dtype) or value not in FLOAT_DTYPES:
        expected = f"one of {', '.join(map(str, FLOAT_DTYPES))}, its name, or 'auto'"
        raise invalid(InputTypeError, "dtype", expected, short_repr(dtype))
    return value


def as_device(name: str, value: Any) -> torch.device | None:
    """Return a device given as such, by name or by index, after allocating on it; None for None."""
    if value is None:
        return None
    expected = "'cpu', 'cuda' or another device that this PyTorch supports"
    if isinstance(value, bool):  # an int to torch.device
        raise invalid(InputTypeError, name, expected, str(value))
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except Exception as error:  # RuntimeError, AssertionError and more
        kind = InputError if isinstance(value, (str, int, torch.device)) else InputTypeError
        # the reason: an unknown or busy device, or a forked process
        raise invalid(kind, name, expected, f"{short_repr(value)} ({first_line(error)})") from error
    return device


def parse_to_args(
    *args: Any, torch_device: Any = None, torch_dtype: Any = None, silence_dtype_warnings: Any = None, **options: Any
) -> dict[str, Any]:
    """Return the arguments of a `to(...)` call by the names that `nn.Module.to` has for them."""
    pairs = [*options.items(), ("device", torch_device), ("dtype", torch_dtype)]
    for arg in args:
        if isinstance(arg, Tensor):
            pairs += [("device", arg.device), ("dtype", arg.dtype)]
        else:
            pairs.append((TO_OPTION_BY_TYPE.get(type(arg), "device"), arg))
    parsed: dict[str, Any] = {}
    for name, arg in pairs:
        if name not in TO_OPTIONS:
            expected = f"arguments among {', '.join(TO_OPTIONS)}"
            raise invalid(InputTypeError, "to", expected, f"an unexpected argument {name!r}", key=name)
        if arg is None:
            continue
        value = as_device(name, arg) if name == "device" else as_dtype(arg) if name == "dtype" else arg
        if value == "auto" or not isinstance(value, TO_OPTIONS[name]):
            raise invalid(InputTypeError, name, f"a {TO_OPTIONS[name].__name__}", short_repr(arg))
        if parsed.setdefault(name, value) != value:
            raise invalid(InputError, name, "one value", f"{parsed[name]} and {value}")
    return parsed


TO_OPTIONS = {"device": torch.device, "dtype": torch.dtype, "non_blocking": bool, "memory_format": torch.memory_format}
TO_OPTION_BY_TYPE = {kind: name for name, kind in TO_OPTIONS.items()}


# Tensors, and methods that take them


def check_tensor(name: str, value: Any, *shape: str | int, like: Tensor | None = None, cast: bool = False) -> None:
    """Check a floating-point tensor: `shape` has an integer per axis of known length, a letter per other axis.

    `like`: a weight whose device the tensor must be on, and whose dtype it must have unless it is `cast` or autocast
    is enabled.
    """
    expected = f"a tensor ({', '.join(map(str, shape))})"
    check_floating(name, value, expected)
    pairs = zip(value.shape, shape, strict=False)
    if value.ndim != len(shape) or not value.numel() or any(isinstance(n, int) and m != n for m, n in pairs):
        raise invalid(InputError, name, expected, describe(value))
    if like is None:
        return
    check_device(name, value, "the weights", like)
    if not cast and value.dtype != like.dtype and not torch.is_autocast_enabled(value.device.type):
        raise invalid(InputTypeError, name, f"{like.dtype}, the dtype of the weights", str(value.dtype))


def check_strided(name: str, value: Tensor) -> None:
    """Check that a tensor is dense: not nested, quantized, sparse or of another layout."""
    if value.is_nested or value.is_quantized or value.layout != torch.strided:
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else str(value.layout)
        raise invalid(InputTypeError, name, "a dense tensor", f"a {kind} tensor")


def check_floating(name: str, value: Any, expected: str) -> None:
    """Check a dense tensor of one of `FLOAT_DTYPES`; `expected` describes it in the error for another type."""
    if not isinstance(value, Tensor):
        raise invalid(InputTypeError, name, expected, describe(value))
    check_strided(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise invalid(InputTypeError, name, "floating-point values of 16 bits or more", f"values of {value.dtype}")


def check_has_data(name: str, value: Tensor) -> None:
    """Check that a tensor is dense and not on the meta device."""
    check_strided(name, value)
    if value.is_meta:
        raise invalid(InputError, name, "a tensor with values", "a tensor on the meta device", "move it to the CPU")


def check_device(name: str, value: Tensor, other: str, like: Tensor) -> None:
    """Check that a tensor is on the device of the tensor `like`, whose name is `other`."""
    if value.device != like.device:
        expected = f"a tensor on {like.device}, the device of {other}"
        raise invalid(InputError, name, expected, f"a tensor on {value.device}")


def check_same_shape(name: str, value: Any, other: str, like: Tensor) -> None:
    """Check a floating-point tensor of the shape and on the device of the tensor `like`, whose name is `other`."""
    expected = f"a tensor of shape {tuple(like.shape)}, the shape of {other}"
    check_floating(name, value, expected)
    check_device(name, value, other, like)
    if value.shape != like.shape:
        raise invalid(InputError, name, expected, describe(value))


def takes_argument(function: Callable[..., Any], name: str) -> bool:
    """Return whether a function has a parameter of this name, or takes any."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def validated(check: Callable[..., None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a method to call `check` with the same arguments first, except under `torch.compile`."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def checked_method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                check(self, *args, **kwargs)
            return method(self, *args, **kwargs)

        return checked_method

    return decorate
