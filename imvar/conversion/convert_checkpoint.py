"""Conversion: inspect a checkpoint in any known layout, check it, write it atomically, and read it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.utils import tqdm

from ..atomic.file import real_path
from ..atomic.folder import ReadFiles, use_consistently
from ..checks import as_path
from ..errors import CheckpointError, InputError, invalid, short_repr
from ..text import format_bytes
from ..weights.model_index import INDEX, PARTS
from ..weights.writing import WrittenFile, size_in_bytes
from .inspect import InspectedPart, Inspection, checkpoint_stamps, inspect_checkpoint
from .layouts import DTYPES, DiffusersLayout, Layout, OriginalLayout
from .sources import locate_source

LAYOUTS: dict[str, type[Layout]] = {"diffusers": DiffusersLayout, "original": OriginalLayout}
MODEL_PARTS = ("unet", "vae", "image_encoder", "safety_checker")

Log = Callable[[str], Any]


@dataclass(frozen=True)
class Report:
    """The result of a conversion. `left_out`: the parts that were not written, and the reason."""

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
    revision: str | None = None,
    dry_run: bool = False,
    verify: bool = False,
    log: Log = lambda line: None,
) -> Report:
    """Convert a checkpoint to a folder in diffusers' layout, or to one safetensors file in the original layout.

    `source`: a folder in any published layout, the folder or file of one part, an original `.ckpt` or safetensors
    file, or one of these on the hub, "owner/name" or "owner/name/file", of which `revision` is a branch, tag or commit.
    `part`: convert this part alone. `dtype`: cast floating-point tensors to it. `ema`: use the moving average of the
    UNet's weights ("yes"), the raw weights ("no"), or the average if there is one ("auto"). `fill`: a checkpoint to
    take missing parts from. `config`: a folder with configs to use instead of those in the source. `dry_run` writes
    nothing; `verify` reads the new files back and compares every bit before they replace the target. `log` is called
    with each line of a report.
    The target is replaced atomically, after all checks. Other files in a target folder stay; if it has a part of
    another checkpoint that would not be replaced, nothing is written.

    Raises `CheckpointError` naming the file and tensor, before anything is written, and `InputError` for arguments.
    """
    as_path("source", source)
    target = as_path("target", target)
    config_folder = None if config is None else as_path("config", config)
    if fill is not None:
        as_path("fill", fill)
    check_choices(to, dtype, part)
    LAYOUTS[to].check_path(target)
    shard_size = size_in_bytes(max_shard_size)
    source = locate_source(source, revision, part)
    fill = None if fill is None else locate_source(fill, None, part)
    if real_path(target) in (real_path(source / name) for name in PARTS):
        hint = "pass the source itself, or another folder"
        raise invalid(InputError, "target", "a folder outside the source", f"a part of it, {str(target)!r}", hint)

    def convert_once(files: ReadFiles) -> Report:
        inspection = inspect_checkpoint(source, ema=ema, config=config_folder, only=part)
        log_inspection(inspection, log)
        parts = inspection.parts
        if fill is not None:
            filler = inspect_checkpoint(fill).parts
            added = {name: filler[name] for name in filler if name not in parts and part in (None, name)}
            log(f"filled from {fill}: {', '.join(added) or 'nothing, as it has no missing part'}")
            parts = parts | added
            check_widths(parts)
        if part is None and (missing := [name for name in inspection.missing if name not in parts]):
            got = f"no {' and no '.join(missing)}"
            hint = "pass fill= (--fill) to take it from another checkpoint, or part= (--part) to convert one part"
            raise invalid(CheckpointError, source / INDEX, "all parts that it lists", got, hint, key=missing[0])
        layout = LAYOUTS[to](target, {name: parts[name] for name in PARTS if name in parts}, DTYPES[dtype], shard_size)
        if part is None:
            layout.check_target()
        layout.check_dtypes()
        left_out = {} if part else layout.left_out
        for name, reason in left_out.items():
            log(f"without {name}: {reason}")
        size = format_bytes(layout.total_bytes)
        log(f"target: {target}, {layout.description}: {', '.join(layout.parts)}; {size}, dtype {dtype}")
        if existing := layout.existing:
            log(f"replaced: {existing}")
        for path in layout.kept_weights:
            log(f"kept: {path}, weights of an earlier checkpoint")
        if dry_run:
            files.check()
            log("dry run: nothing was written")
            return Report(inspection, layout.parts, left_out)
        layout.check_space()
        progress = partial(tqdm, unit="B", unit_scale=True, disable=None)  # shown on a terminal only
        with progress(desc="checking", total=layout.total_bytes) as bar:
            layout.check_values(bar.update)
        task, passes = ("writing and verifying", 2) if verify else ("writing", 1)
        with progress(desc=task, total=passes * layout.total_bytes) as bar:
            written = layout.write_parts(bar.update, verify, files)
        for file in written:
            log(f"wrote {file.path}: {file.tensors} tensors, {format_bytes(file.bytes)}, sha256 {file.sha256}")
        if verify:
            log("verified: the new files were read back and are identical, bit for bit")
        return Report(inspection, layout.parts, left_out, written)

    sources = [path for path in (source, fill, config_folder) if path is not None]
    return use_consistently(source, partial(checkpoint_stamps, sources), convert_once)


def check_choices(to: str, dtype: str, part: str | None) -> None:
    """Raise `InputError` for a value that is none of the choices of its argument."""
    for name, value, choices in (("to", to, LAYOUTS), ("dtype", dtype, DTYPES), ("part", part, (None, *MODEL_PARTS))):
        if not isinstance(value, str | None) or value not in choices:
            raise invalid(InputError, name, " or ".join(map(repr, choices)), short_repr(value))


def check_widths(parts: dict[str, InspectedPart]) -> None:
    """Raise `CheckpointError` unless the encoder's projection_dim equals the UNet's cross_attention_dim."""
    unet, encoder = parts.get("unet"), parts.get("image_encoder")
    if unet and unet.source and encoder and encoder.source:
        width, got = unet.component.config.cross_attention_dim, encoder.component.config.projection_dim
        if width != got:
            expected = f"projection_dim {width}, the cross_attention_dim of the UNet of {unet.source.path}"
            raise invalid(CheckpointError, encoder.source.path, expected, str(got))


def log_inspection(inspection: Inspection, log: Log) -> None:
    """Report the source: a line for each part, those for dropped tensors, and the notes."""
    log(f"source: {inspection.source}, {inspection.layout}")
    for name, part in inspection.parts.items():
        if part.source:
            dtypes = " and ".join(f"{count} {dtype}" for dtype, count in sorted(part.dtypes.items()))
            log(f"  {name}: {part.component.num_parameters():,} parameters in {dtypes} tensors; {part.description}")
        else:
            log(f"  {name}: {type(part.component).__name__}, {part.description}")
        for pattern, count in part.dropped.items():
            log(f"    dropped, as no model uses it: {pattern}" + (f", {count} tensors" if count > 1 else ""))
    for note in inspection.notes:
        log(f"  {note}")
