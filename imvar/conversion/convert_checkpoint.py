"""Any known checkpoint in, a clean one out: looked over, told, checked, written whole, read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.utils import tqdm

from ..checks import as_path
from ..errors import CheckpointError, InputError, short_repr
from ..weights.model_index import INDEX, PARTS
from ..weights.writing import WrittenFile, size_in_bytes
from .inspect import InspectedPart, Inspection, inspect_checkpoint
from .layouts import DiffusersLayout, Layout, OriginalLayout

DTYPES = {"keep": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS: dict[str, type[Layout]] = {"diffusers": DiffusersLayout, "original": OriginalLayout}
MODELS = ("unet", "vae", "image_encoder", "safety_checker")

Log = Callable[[str], Any]


@dataclass(frozen=True)
class Report:
    """What a conversion found and wrote. `left_out`: the parts that the target goes without, and why."""

    source: Inspection
    parts: dict[str, InspectedPart]
    left_out: dict[str, str]
    written: list[WrittenFile] = field(default_factory=list)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Literal["diffusers", "original"] = "diffusers",
    dtype: Literal["keep", "fp32", "fp16", "bf16"] = "keep",
    ema: Literal["auto", "yes", "no"] = "auto",
    part: str | None = None,
    fill: str | Path | None = None,
    config: str | Path | None = None,
    max_shard_size: int | str = "10GB",
    dry_run: bool = False,
    verify: bool = False,
    say: Log = lambda line: None,
) -> Report:
    """Convert a checkpoint to a folder in diffusers' layout, or to one safetensors file in the original layout.

    `source`: a folder in any published layout, the folder or file of one part, or an original `.ckpt` or safetensors
    file. `part`: convert this part alone. `dtype`: what floating tensors become. `ema`: which of a UNet's weights,
    where the source has a moving average. `fill`: a checkpoint to take the parts from that the source has not.
    `config`: a folder with settings to go by, instead of those that are with the weights. `dry_run` writes nothing;
    `verify` reads back what was written, before it takes its place, and compares every bit. `say` is told what is
    found and done, line by line.
    An existing target is replaced if all goes well, and only then; whatever else is in its folder stays, but for parts
    of another checkpoint, beside which nothing is written.

    Raises `CheckpointError` naming the file and tensor, before anything is written, and `InputError` for arguments.
    """
    source, target = as_path("source", source), as_path("target", target)
    settings = None if config is None else as_path("config", config)
    filler = None if fill is None else as_path("fill", fill)
    check_choices(to, dtype, part)
    LAYOUTS[to].check_path(target)
    shard_size = size_in_bytes(max_shard_size)
    if target.absolute().parent == source.absolute() and target.name in PARTS:
        raise InputError(
            f"target={str(target)!r}: is a part of the source; the source itself, or another folder, would do"
        )
    if filler is not None and not filler.exists():
        raise CheckpointError("no such file or folder to fill from", path=filler)
    found = inspect_checkpoint(source, ema=ema, config=settings, only=part)
    log_inspection(found, say)
    parts = dict(found.parts)
    if filler is not None:
        spare = {
            name: more
            for name, more in inspect_checkpoint(filler).parts.items()
            if name not in parts and part in (None, name)
        }
        say(f"filled from {fill}: {', '.join(spare) or 'nothing, as nothing is missing that it has'}")
        parts |= spare
        check_compatible(parts)
    if part is None and (lost := [name for name in found.lacking if name not in parts]):
        raise CheckpointError(
            f"names {' and '.join(lost)}, which is not there; fill= (--fill) can take it from "
            "another checkpoint, part= (--part) converts one part alone",
            path=source / INDEX,
            key=lost[0],
        )
    job = LAYOUTS[to](target, {name: parts[name] for name in PARTS if name in parts}, DTYPES[dtype], shard_size)
    if part is None:
        job.check_leftovers()
    left_out = {} if part else job.left_out
    for name, why in left_out.items():
        say(f"without {name}: {why}")
    say(f"target: {target}, {job.kind}: {', '.join(job.parts)}; {format_bytes(job.bytes)}, dtype {dtype}")
    for path in job.beside:
        say(f"stays beside: {path}, which goes with what was there before")
    if dry_run:
        say("dry run: nothing was written")
        return Report(found, job.parts, left_out)
    job.check_space()
    with progress("checking", job.bytes) as bar:
        job.check_values(bar.update)
    with progress("writing and verifying", 2 * job.bytes) if verify else progress("writing", job.bytes) as bar:
        written = job.write(bar.update, verify)
    for file in written:
        say(f"wrote {file.path}: {file.tensors} tensors, {format_bytes(file.bytes)}, sha256 {file.sha256}")
    if verify:
        say("verified: what was written reads back the same, bit for bit")
    return Report(found, job.parts, left_out, written)


def progress(what: str, total: int) -> tqdm:
    """A bar over the bytes of a job, where there is a terminal to show it."""
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None)


def check_choices(to: str, dtype: str, part: str | None) -> None:
    """Arguments that cannot be honoured, before anything is read."""
    for name, value, choices in (("to", to, LAYOUTS), ("dtype", dtype, DTYPES), ("part", part, (None, *MODELS))):
        if not isinstance(value, str | None) or value not in choices:
            raise InputError(f"{name}={short_repr(value)}: {' or '.join(map(repr, choices))} would do", key=name)


def check_compatible(parts: dict[str, InspectedPart]) -> None:
    """Parts that come from two checkpoints have to speak of pictures in numbers of one length."""
    if {"unet", "image_encoder"} <= parts.keys():
        unet, encoder = parts["unet"], parts["image_encoder"]
        wanted, given = unet.value.config.cross_attention_dim, encoder.value.config.projection_dim
        if wanted != given:
            raise CheckpointError(
                f"the image encoder gives {given} numbers (projection_dim), and the UNet of "
                f"{unet.path} takes {wanted} (cross_attention_dim)",
                path=encoder.path,
            )


def log_inspection(found: Inspection, say: Log) -> None:
    """What there is, a line for each part."""
    say(f"source: {found.source}, {found.kind}")
    for part in found.parts.values():
        if part.has_weights:
            dtypes = " and ".join(f"{count} {dtype}" for dtype, count in sorted(part.dtypes.items()))
            say(f"  {part.part}: {part.value.num_parameters():,} numbers in {dtypes} tensors; {part.how}")
        else:
            say(f"  {part.part}: {type(part.value).__name__}, {part.how}")
        for pattern, count in part.dropped.items():
            say(f"    left out, as no model uses it: {pattern}" + (f", {count} tensors" if count > 1 else ""))
    for note in found.notes:
        say(f"  {note}")


def format_bytes(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
