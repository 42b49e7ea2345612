"""Checks on the numbers, dtypes and tensors that a caller hands in."""

from __future__ import annotations

import functools
import math
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import InputError, InputTypeError, short_repr

MAX_WIDTH = 2**20  # channels and other widths: more than any model has, and no product of three overflows
MAX_BLOCKS = 16  # each halves the picture
MAX_SIDE = 2**15  # pixels
FLOAT_DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64  # which can be computed with


def check_int(name: str, value: Any, low: int = 1, high: float = math.inf) -> int:
    """A whole number between bounds, as an int."""
    needed = f"a whole number from {low}" + (f" to {high}" if high < math.inf else "")
    try:
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # a tensor's, where it has no value to read
        number = None
    if number is None or is_bool(value):
        raise InputTypeError(f"{name}={short_repr(value)}: {needed} would do", key=name)
    if not low <= number <= high:
        raise InputError(f"{name}={short_repr(value)}: {needed} would do", key=name)
    return number


def check_float(name: str, value: Any, low: float = 0.0, high: float = 1.0) -> float:
    """A number between bounds, as a float; NaN is between none."""
    number = as_float(value)
    if number is None or not low <= number <= high:
        kind = InputTypeError if number is None else InputError
        raise kind(f"{name}={short_repr(value)}: a number from {low:g} to {high:g} would do", key=name)
    return number


def check_finite(name: str, value: Any) -> float:
    """A number that is neither NaN nor infinite, as a float."""
    number = as_float(value)
    if number is None or not math.isfinite(number):
        kind = InputTypeError if number is None else InputError
        raise kind(f"{name}={short_repr(value)}: a finite number would do", key=name)
    return number


def as_float(value: Any) -> float | None:
    """A number of any kind as a float; None for what is none."""
    try:
        return None if is_bool(value) or isinstance(value, (str, bytes, bytearray)) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def is_bool(value: Any) -> bool:
    """Whether this is True or False, which Python counts among the numbers, or a tensor of them."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def check_ints(config: Any, *names: str, high: int = MAX_WIDTH) -> None:
    """Settings that are whole numbers from 1; one may be None where its type says so."""
    for name in names:
        if (value := getattr(config, name)) is not None:
            check_int(name, value, high=high)


def check_block_channels(config: Any) -> None:
    """`block_out_channels`: one width per level."""
    widths = config.block_out_channels
    if not 1 <= len(widths) <= MAX_BLOCKS:
        raise InputError(
            f"block_out_channels: {len(widths)} levels came; 1 to {MAX_BLOCKS} would do", key="block_out_channels"
        )
    for width in widths:
        check_int("block_out_channels", width, high=MAX_WIDTH)


def check_image_size(name: str, value: Any) -> None:
    """A size in pixels: one number for a square, height and width, or None for any."""
    if value is None:
        return
    pair = value if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2:
        raise InputError(f"{name}={short_repr(value)}: a number, or height and width, would do", key=name)
    for one in pair:
        check_int(name, one, high=MAX_SIDE)


def item(value: Any) -> Any:
    """What a tensor of one element holds, a float without fraction as an int; anything else as it came."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        value = value.item()
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_type(name: str, value: Any, *kinds: type) -> Any:
    """A value of one of these types, or None; so that 'no' is not taken for yes."""
    if value is not None and not isinstance(value, kinds):
        would_do = " or ".join("True or False" if kind is bool else f"a {kind.__name__}" for kind in kinds)
        raise InputTypeError(f"{name}={short_repr(value)}: {would_do} would do", key=name)
    return value


def as_path(name: str, value: Any) -> Path:
    """A path that a caller names, of a file or folder that may not be there yet."""
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise InputTypeError(f"{name}={short_repr(value)}: a path would do", key=name)
    if not text or "\0" in text:
        raise InputError(f"{name}={short_repr(value)}: a path, of characters other than NUL, would do", key=name)
    return Path(text)


Dtype = torch.dtype | Literal["auto"] | None
"""What weights become as they are loaded: this, the widest that the file has of them, or each as it is."""


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | Literal["auto"]:
    """A dtype from itself or its name, or `"auto"`; float32 where nothing is asked for."""
    if isinstance(dtype, str) and dtype == "auto":
        return "auto"
    if dtype is None:
        return torch.float32
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in FLOAT_DTYPES:
        raise InputTypeError(
            f"dtype={short_repr(dtype)}: one of floats such as torch.float16, its name, or 'auto' would do"
        )
    return found


def as_device(name: str, value: Any) -> torch.device | None:
    """A device from itself, its name or its number, tried out; None as it came. `InputError` for one not here."""
    if value is None:
        return None
    would_do = "'cpu', 'cuda' or another that torch has here"
    if isinstance(value, bool):  # which counts as a number
        raise InputTypeError(f"{name}={value}: {would_do} would do", key=name)
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except Exception as error:  # torch raises RuntimeError, AssertionError and more
        kind = InputError if isinstance(value, (str, int, torch.device)) else InputTypeError
        reason = str(error).partition("\n")[0]  # no such device, none that is free, or a process that was forked
        raise kind(f"{name}={short_repr(value)}: {would_do} would do; torch says: {reason}", key=name) from error
    return device


def parse_to_args(
    *args: Any,
    device: Any = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    non_blocking: Any = None,
    memory_format: Any = None,
    silence_dtype_warnings: Any = None,
    **others: Any,
) -> dict[str, Any]:
    """What `to(...)` was asked for, by the names that `nn.Module.to` has for it."""
    for name in others:
        raise InputTypeError(f"to: unexpected argument {name!r}; it takes {', '.join(TO_ARGUMENTS)}", key=name)
    asked = [
        ("device", device),
        ("dtype", dtype),
        ("dtype", torch_dtype),
        ("non_blocking", non_blocking),
        ("memory_format", memory_format),
    ]
    for value in args:
        if isinstance(value, Tensor):
            asked += [("device", value.device), ("dtype", value.dtype)]
        else:
            asked.append((TO_ARGUMENT_BY_TYPE.get(type(value), "device"), value))
    found: dict[str, Any] = {}
    for name, value in asked:
        if value is None:
            continue
        read = as_device(name, value) if name == "device" else as_dtype(value) if name == "dtype" else value
        if read == "auto" or not isinstance(read, TO_ARGUMENTS[name]):
            raise InputTypeError(f"{name}={short_repr(value)}: a {TO_ARGUMENTS[name].__name__} would do", key=name)
        if found.setdefault(name, read) != read:
            raise InputError(f"{name}: {found[name]} and {read} came; one of them would do", key=name)
    return found


TO_ARGUMENTS = {
    "device": torch.device,
    "dtype": torch.dtype,
    "non_blocking": bool,
    "memory_format": torch.memory_format,
}
TO_ARGUMENT_BY_TYPE = {torch.dtype: "dtype", bool: "non_blocking", torch.memory_format: "memory_format"}


# Tensors, and the methods that are called with them


def check_tensor(name: str, value: Any, *form: str | int, like: Tensor | None = None, cast: bool = False) -> None:
    """Floats of this form, a number for an axis whose length is known and a letter for one that is not.

    `like`: on the device of this tensor, as its weights are, and of its dtype, unless that is `cast`, or autocast
    sees to it.
    """
    words = f"a tensor ({', '.join(map(str, form))})"
    if not isinstance(value, Tensor):
        raise InputTypeError(f"{name}: {type(value).__name__} came; {words} would do", key=name)
    check_floating(name, value)
    known = zip(value.shape, form, strict=False)
    other = any(isinstance(wanted, int) and n != wanted for n, wanted in known)
    if value.ndim != len(form) or not value.numel() or other:
        raise InputError(f"{name}: shape {tuple(value.shape)} came; {words} would do", key=name)
    if like is None:
        return
    if value.device != like.device:
        raise InputError(
            f"{name}: a tensor on {value.device} came to weights on {like.device}; one device for both would do",
            key=name,
        )
    if not cast and value.dtype != like.dtype and not torch.is_autocast_enabled(value.device.type):
        raise InputTypeError(
            f"{name}: {value.dtype} came to weights of {like.dtype}; one dtype for both would do", key=name
        )


def check_strided(name: str, value: Tensor) -> None:
    """A tensor whose values lie in memory one beside another."""
    kind = (
        "nested"
        if value.is_nested
        else "quantized"
        if value.is_quantized
        else str(value.layout)
        if value.layout != torch.strided
        else None
    )
    if kind:
        raise InputTypeError(f"{name}: a {kind} tensor came; a dense one would do", key=name)


def check_floating(name: str, value: Tensor) -> None:
    """A dense tensor of floats that can be computed with."""
    check_strided(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise InputTypeError(f"{name}: values of {value.dtype} came; floats of 16 bits or more would do", key=name)


def check_has_data(name: str, value: Tensor) -> None:
    """A dense tensor that has values, and is not a mere description of one."""
    check_strided(name, value)
    if value.is_meta:
        raise InputError(
            f"{name}: a tensor on the meta device came, which has no values; one on the CPU would do", key=name
        )


def check_same_shape(name: str, value: Any, other: str, like: Tensor) -> None:
    """Floats in the shape of another tensor, beside it."""
    if not isinstance(value, Tensor):
        raise InputTypeError(f"{name}: {type(value).__name__} came; a tensor of {other}'s shape would do", key=name)
    check_floating(name, value)
    if value.device != like.device:
        raise InputError(f"{name}: a tensor on {value.device} came; {like.device}, as {other}, would do", key=name)
    if value.shape != like.shape:
        raise InputError(f"{name}: shape {tuple(value.shape)} came; {other}'s, {tuple(like.shape)}, would do", key=name)


def validated(check: Callable[..., None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A method that is first short_repr to `check`, with all that it is called with; not where it is being compiled."""

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                check(self, *args, **kwargs)
            return method(self, *args, **kwargs)

        return run

    return wrap
