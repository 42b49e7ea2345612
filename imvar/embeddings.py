"""Image embeddings as values: mix, interpolate and vary them, save and load them.

An embedding is a floating-point tensor (b, 1, c): the `image_embeds` of the image encoder, one token per image. (b, c)
is accepted everywhere, and returned where it was passed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .atomic.file import real_path
from .checks import as_path, check_finite, check_float, check_floating, check_has_data, check_same_shape
from .errors import CheckpointError, InputError, InputTypeError, describe, in_checkpoint, invalid, short_repr
from .noise import Seeds, per_image_seeds, randn, seed_generators
from .records.digests import file_digest, pixels_digest
from .sources import embeds_note, note_combination, note_embeds
from .weights.reading import read_tensors

IMAGE_EMBEDS = "image_embeds"  # the name of the tensor in a file
EMBEDS_SHAPE = "a tensor (b, 1, c) or (b, c)"


def mix(weighted: Iterable[tuple[Tensor, float]]) -> Tensor:
    """Return the weighted sum of embeddings of one shape, as in `mix([(fox, 0.7), (panda, 0.3)])`.

    Equal to `0.7 * fox + 0.3 * panda`, added in this order in the embeddings' dtype. Weights are any finite numbers,
    negative ones too, and are not normalized: those with a sum of 1 keep the scale of similar embeddings. The sum is
    that of Kandinsky's `interpolate` (arXiv:2310.03502).

    Raises `InputError` for embeddings that differ in shape, dtype or device, or a weight that is not a finite number.
    """
    pairs = list(weighted) if isinstance(weighted, Iterable) and not isinstance(weighted, (Tensor, dict)) else []
    if not pairs or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        got = "an empty list" if isinstance(weighted, (list, tuple)) and not weighted else short_repr(weighted)
        raise invalid(InputTypeError, "weighted", "pairs such as [(fox, 0.7), (panda, 0.3)]", got)
    terms = []
    for i, (embeds, weight) in enumerate(pairs):
        check_embeds(f"weighted[{i}][0]", embeds, like=pairs[0][0] if i else None)
        terms.append(embeds * check_finite(f"weighted[{i}][1]", weight))
    return note_combination(sum(terms[1:], start=terms[0]), [(e, {"weight": float(w)}) for e, w in pairs])


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return the spherical interpolation between embeddings of one shape: `a` at t = 0, `b` at t = 1, exactly.

    Each row turns from the direction of `a` to that of `b` at a constant rate (Shoemake, "Animating rotation with
    quaternion curves", SIGGRAPH 1985), and its length changes linearly. Opposite directions have no shortest path
    between them; a fixed one is taken. A row of zeros has no direction and takes that of the other. Computed in float32
    or wider.

    Raises `InputError` for embeddings that differ in shape, dtype or device, or `t` outside [0, 1].
    """
    check_embeds("a", a)
    check_embeds("b", b, like=a)
    t = check_float("t", t)
    parts = [(embeds, {"slerp": t}) for embeds in (a, b)]
    if t in (0, 1):
        return note_combination((b if t else a).clone(), parts)
    start, end = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
    length = (1 - t) * start.norm(dim=-1, keepdim=True) + t * end.norm(dim=-1, keepdim=True)
    start, end = F.normalize(start, dim=-1), F.normalize(end, dim=-1)
    across = orthogonal_part(end, start)
    sine = across.norm(dim=-1, keepdim=True)
    angle = t * torch.atan2(sine, (start * end).sum(-1, keepdim=True))
    axis = F.one_hot(start.abs().argmin(-1), start.shape[-1]).to(start.dtype)  # for an `end` parallel to it
    across = torch.where(sine > 1e-6, F.normalize(across, dim=-1), axis)
    across = F.normalize(orthogonal_part(across, start), dim=-1)
    direction = F.normalize(angle.cos() * start + angle.sin() * across, dim=-1)
    return note_combination((length * direction).to(a.dtype), parts)


def join_embeds(embeds: Sequence[Tensor]) -> Tensor:
    """Return embeddings (1, 1, c) as one tensor (b, 1, c), with the notes of what they were computed from."""
    if len(embeds) == 1:
        return embeds[0]
    if len(shapes := {describe(each) for each in embeds}) > 1:
        raise invalid(InputError, IMAGE_EMBEDS, "embeddings of one width", " and ".join(sorted(shapes)))
    notes = [embeds_note(each) for each in embeds]
    unknown = [[{"role": IMAGE_EMBEDS, "name": None, "sha256": None, "pixels": pixels_digest(each)}] for each in embeds]
    rows = [note.rows[0] if note else row for note, row in zip(notes, unknown, strict=True)]
    encoders = [note.encoder for note in notes if note and note.encoder]
    joined = torch.cat(list(embeds))
    return joined if len({*encoders}) > 1 else note_embeds(joined, rows, next(iter(encoders), None))


def orthogonal_part(x: Tensor, unit: Tensor) -> Tensor:
    """Return the part of vectors (..., c) that is orthogonal to unit vectors (..., c)."""
    return x - (x * unit).sum(-1, keepdim=True) * unit


def augment(image_embeds: Tensor, amount: float, seed: Seeds = 0) -> Tensor:
    """Return embeddings with noise in place of a part of them; amounts from 0.45 to 0.75 give related images.

    `sqrt(1 - amount**2) * e + amount * rms(e) * noise` for each row e, where rms(e) is the root of the mean of its
    squares and noise is standard normal: variance-preserving (arXiv:2011.13456), so that the expected squared length
    stays. Amount 0 returns the same values, 1 noise alone. Computed in float32 or wider.

    `seed`: s for s + k in row k, or a list of one each, 0 to 2^63 - 1. A seed draws the same noise on any device.

    Raises `InputError` for an amount outside [0, 1] or seeds that are not such integers.
    """
    check_embeds("image_embeds", image_embeds)
    amount = check_float("amount", amount)
    seeds = per_image_seeds(seed, len(image_embeds))
    parts = [(image_embeds, {"augment": [amount, *seeds]})]
    if not amount:
        return note_combination(image_embeds.clone(), parts)
    e = image_embeds.to(torch.promote_types(image_embeds.dtype, torch.float32))
    noise = randn(e.shape, seed_generators(seeds), dtype=torch.float32, device=e.device)
    rms = e.square().mean(-1, keepdim=True).sqrt()
    augmented = ((1 - amount**2) ** 0.5 * e + amount * rms * noise).to(image_embeds.dtype)
    return note_combination(augmented, parts)


def save_image_embeds(path: str | Path, image_embeds: Tensor) -> None:
    """Write embeddings to a safetensors file, atomically: one tensor, `image_embeds`, (b, 1, c) in its dtype.

    Raises `InputError` for a path that does not end in .safetensors, `CheckpointError` if it cannot be written.
    """
    from .weights.writing import write_tensors  # see weights/__init__.py

    path = embeds_path(path)
    write_tensors(path, {IMAGE_EMBEDS: as_embeddings("image_embeds", image_embeds)})


def load_image_embeds(path: str | Path) -> Tensor:
    """Return the embeddings in a file of `save_image_embeds`, (b, 1, c) in their dtype, on the CPU.

    Raises `InputError` for a path that does not end in .safetensors, `CheckpointError` for a file that cannot be read,
    has other tensors, or not finite embeddings of this shape.
    """
    path = embeds_path(path)
    tensors = read_tensors(path, disable_mmap=True)
    if tensors.keys() != {IMAGE_EMBEDS}:
        names = short_repr(sorted(tensors))
        raise invalid(CheckpointError, path, f"one tensor, {IMAGE_EMBEDS}", f"tensors {names}", key=IMAGE_EMBEDS)
    try:
        embeds = as_embeddings(IMAGE_EMBEDS, tensors[IMAGE_EMBEDS])
    except InputError as error:
        raise in_checkpoint(error, path) from error
    file = {"name": path.name, "sha256": file_digest(path)}
    rows = [[{"role": "image_embeds", **file, "pixels": pixels_digest(row[None])}] for row in embeds]
    return note_embeds(embeds, rows)


def embeds_path(path: Any) -> Path:
    """Return the path of a file of embeddings."""
    path = as_path("path", path)
    if path.suffix.lower() != ".safetensors":
        raise invalid(InputError, "path", "a path that ends in .safetensors", short_repr(str(path)))
    return real_path(path)


def as_embeddings(name: str, value: Any) -> Tensor:
    """Return embeddings (b, c) or (b, 1, c) as (b, 1, c), checked by `check_embeds`."""
    check_embeds(name, value)
    return value[:, None] if value.ndim == 2 else value


def cast_embeds(name: str, embeds: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return finite embeddings of any number of tokens on `device` in `dtype`; raise `InputError` if they overflow."""
    cast = embeds.to(device, dtype)
    if not cast.isfinite().all():
        raise invalid(InputError, name, f"values within {dtype}", f"values up to {float(embeds.abs().max()):g}")
    return cast


def check_embeds(name: str, value: Any, like: Tensor | None = None) -> None:
    """Check finite embeddings (b, 1, c) or (b, c), of the shape, dtype and device of `like` if that is given."""
    check_floating(name, value, EMBEDS_SHAPE)
    check_has_data(name, value)
    if value.ndim not in (2, 3) or not value.numel():
        raise invalid(InputError, name, EMBEDS_SHAPE, describe(value))
    if value.ndim == 3 and value.shape[1] != 1:
        hint = "combine them with imvar.mix, as the attention between several was not trained"
        raise invalid(InputError, name, f"{EMBEDS_SHAPE}, one token per image", describe(value), hint)
    if not value.isfinite().all():
        raise invalid(InputError, name, "finite values", "NaN or infinite values")
    if like is not None:
        check_same_shape(name, value, "the first", like)
        if value.dtype != like.dtype:
            raise invalid(InputTypeError, name, f"{like.dtype}, the dtype of the first", str(value.dtype))
