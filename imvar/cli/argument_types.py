"""Types of command line arguments: each parses a text, or raises `ArgumentTypeError` with what was expected."""

from __future__ import annotations

import argparse
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

from ..choices import SCHEDULERS
from ..limits import MAX_SEED
from ..text import printable, short_repr

GPU = re.compile(r"[0-9]{1,4}|(GPU|MIG)-[\w/-]+")
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
DEVICE = re.compile(r"[a-z][a-z0-9_]*(:[0-9]{1,3})?")


def int_arg(text: str, low: int = 1, high: int = 10**6) -> int:
    """Parse an integer from `low` to `high`."""
    if not text.isdecimal() or len(text) > 19 or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"expected an integer from {low} to {high}, got {short_repr(text)}")
    return int(text)


seed_arg = partial(int_arg, low=0, high=MAX_SEED)
port_arg = partial(int_arg, low=0, high=2**16 - 1)
count_arg = partial(int_arg, low=2)  # of images with two ends


def float_arg(text: str, low: float = -math.inf, high: float = math.inf) -> float:
    """Parse a finite number from `low` to `high`."""
    try:
        if math.isfinite(number := float(text)) and low <= number <= high:
            return number
    except ValueError:
        pass
    expected = f"a number from {low:g} to {high:g}" if high < math.inf else "a finite number"
    expected += f" from {low:g}" if -math.inf < low and high == math.inf else ""
    raise argparse.ArgumentTypeError(f"expected {expected}, got {short_repr(text)}")


fraction_arg = partial(float_arg, low=0, high=1)
share_arg = partial(float_arg, low=0.01, high=1)
guidance_arg = partial(float_arg, low=0)


def device_arg(text: str) -> str:
    """Parse the name of a device, such as "cuda:1"; whether there is one of this name, PyTorch knows."""
    if not DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda, cuda:1 or another device, got {short_repr(text)}")
    return text


def part_arg(text: str) -> str:
    """Check a part such as "0/4", the first of four."""
    index, slash, of = text.partition("/")
    if not slash or not index.isdecimal() or not of.isdecimal() or not int(index) < int(of):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, such as 0/4, got {short_repr(text)}")
    return text


def gpus_arg(text: str) -> str:
    """Check a list of GPUs: "all", or numbers or UUIDs as CUDA_VISIBLE_DEVICES has them."""
    if text != "all" and not all(GPU.fullmatch(name) for name in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected numbers of GPUs such as 0,1, or all, got {short_repr(text)}")
    return text


def photo_arg(text: str) -> Path:
    """Parse the path of an input file."""
    if URL.match(text):
        expected = f"the path of a file, got the address {short_repr(printable(text))}"
        raise argparse.ArgumentTypeError(f"expected {expected}; nothing is fetched: download it first")
    return Path(text)


def address_arg(text: str) -> Path | str:
    """Parse the path of an input or of a folder, or an address in an object store, which is returned unchanged."""
    return text if URL.match(text) else folder_arg(text)


def folder_arg(text: str) -> Path:
    """Parse the path of a folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got ''; for the present one use .")
    return Path(text)


def size_arg(text: str) -> tuple[int, int]:
    """Parse height and width: "512" is (512, 512), "384x512" is (384, 512)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) in range(8, 2**16, 8) for side in sides):
        expected = "512 or 384x512 (height first), multiples of 8 below 65536"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {short_repr(text)}")
    return int(sides[0]), int(sides[-1])


def weighted_arg(text: str) -> tuple[Path, float]:
    """Parse a path and its weight: "fox.png=0.7"."""
    path, _, weight = text.rpartition("=")
    try:
        number = float_arg(weight)
    except argparse.ArgumentTypeError:
        number = None
    if not path or number is None:
        expected = "PHOTO=WEIGHT such as fox.png=0.7, with a finite number as the weight"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {short_repr(text)}")
    return photo_arg(path), number


def axis_arg(text: str) -> tuple[str, list[Any]]:
    """Parse an option and its values: "guidance=1,3,7.5", or "seed=0..5" for 0 to 5."""
    name, _, values = text.partition("=")
    if name not in AXES or not values:
        names = ", ".join(AXES)
        raise argparse.ArgumentTypeError(f"expected one of {names} and values, as in seed=0..5, got {short_repr(text)}")
    parse = AXES[name]
    first, is_range, last = values.partition("..")
    if is_range and parse in (int_arg, seed_arg):
        low, high = parse(first), parse(last)
        if not low <= high < low + MAX_AXIS:
            expected = f"{name}=LOW..HIGH of at most {MAX_AXIS} values"
            raise argparse.ArgumentTypeError(f"expected {expected}, got {short_repr(text)}")
        return name, list(range(low, high + 1))
    parsed = [parse(value) for value in values.split(",")]
    if len(set(parsed)) < len(parsed):
        raise argparse.ArgumentTypeError(f"expected different values, got {short_repr(text)}")
    return name, parsed


def scheduler_arg(text: str) -> str:
    """Parse the name of a scheduler."""
    if text not in SCHEDULERS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(SCHEDULERS)}, got {short_repr(text)}")
    return text


MAX_AXIS = 100  # values
AXES = {
    "guidance": guidance_arg,
    "seed": seed_arg,
    "steps": int_arg,
    "scheduler": scheduler_arg,
    "strength": fraction_arg,
    "rescale": fraction_arg,
}
"""What `imvar grid` varies along rows and columns: the names of options, with their types."""
