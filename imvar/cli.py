"""The command line: `imvar vary PHOTO...` makes variations of photographs, and a contact sheet of them all."""

from __future__ import annotations

import argparse
import gc
import io
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from . import __version__
from .atomic.file import atomic_write
from .contact_sheet import SheetRow, contact_sheet
from .errors import ImvarError, InputError, OutOfMemoryError, short_repr
from .image.load_image import check_overwrites, load_image, unique_names
from .malloc import keep_freed_memory
from .noise import MAX_SEED
from .oom import explain_out_of_memory
from .pipeline import StableDiffusionImageVariationPipeline
from .schedulers import DDIMScheduler, LMSDiscreteScheduler, PNDMScheduler
from .weights.bundled import bundled_examples

CHECKPOINT, REVISION = "lambdalabs/sd-image-variations-diffusers", "v2.0"
EMOJI = "imvar-emoji"
EMOJI_NOTICE = (
    f"{EMOJI} knows drawings in the style of emoji: objects, animals, food, vehicles and faces; not photographs, "
    f"which --checkpoint {CHECKPOINT} knows, a download of 6 GB"
)
EMOJI_SIZE = (64, 64)
STEPS, EMOJI_STEPS = 50, 20
FLAG_NOTES = {"black": " and made black", "blur": " and blurred", "keep": ""}  # to what the safety checker flagged
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEDULERS = {  # and what each is told: some published configs leave clip_sample on, which spoils latents
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),  # as published
    "lms": (LMSDiscreteScheduler, {}),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 done, 1 failed, 2 not understood, 130 stopped by Ctrl-C."""
    if argv is None:  # run as a program
        gc.freeze()  # imported modules are never garbage: keep collections, also the one at exit, from traversing them
    args = parser().parse_args(argv)
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of photos need not exist in a terminal's encoding
    try:
        with explain_out_of_memory():
            vary(args)
    except OutOfMemoryError:
        print("imvar: out of memory; use --batch 1 or a smaller --size", file=sys.stderr)
    except (ImvarError, OSError) as error:
        print(f"imvar: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("imvar: stopped", file=sys.stderr)
        return 130  # as shells have it
    else:
        return 0
    return 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="imvar", description="Variations of a picture with Stable Diffusion.")
    top.add_argument("--version", action="version", version=f"imvar {__version__}")
    jobs = top.add_subparsers(required=True, metavar="JOB")
    job = jobs.add_parser(
        "vary",
        help="make variations of pictures",
        description="Make variations of each picture, and one contact sheet that shows them beside it.",
        epilog=f"The checkpoint {EMOJI} comes with imvar and needs no download: a small model that makes 64 x 64 "
        "pictures in seconds. It knows drawings in the style of emoji, not photographs. With no PHOTO it makes "
        "variations of drawings that come with it. "
        "Variation k of a photo comes of seed S + k and is saved as PHOTO-SEED.png, the sheet as "
        "contact-sheet.png; files of those names in FOLDER, such as an earlier run's, are replaced. "
        "Exit status: 0 done, 1 failed, 2 misused, 130 stopped.",
    )
    add = job.add_argument
    job.set_defaults(misused=job.error)
    add(
        "photos",
        nargs="*",
        type=Path,
        metavar="PHOTO",
        help=f"a JPEG, PNG or WebP file (default with --checkpoint {EMOJI}: drawings that come with it)",
    )
    add("-n", type=int_arg, default=4, metavar="N", help="variations of each photo (default: 4)")
    add(
        "-o",
        dest="out",
        type=Path,
        default=Path("variations"),
        metavar="FOLDER",
        help="where the pictures go; made if need be (default: variations)",
    )
    add("--seed", type=seed_arg, default=0, metavar="S", help="seed of the first variation (default: 0)")
    add("--steps", type=int_arg, metavar="N", help=f"steps of denoising (default: {STEPS}; {EMOJI_STEPS} with {EMOJI})")
    add("--guidance", type=float_arg, default=3.0, metavar="W", help="how closely to follow the photo (default: 3)")
    add(
        "--size",
        type=size_arg,
        default=(None, None),
        metavar="N|HxW",
        help="pixels of a variation, multiples of 8 (default: what the checkpoint was trained at)",
    )
    add("--scheduler", choices=SCHEDULERS, help="default: the checkpoint's own")
    add(
        "--checkpoint",
        default=CHECKPOINT,
        metavar="ID|FOLDER|FILE",
        help=f"a hub id, a folder in the published layout, an original .ckpt file, or {EMOJI} (default: {CHECKPOINT})",
    )
    add("--revision", help=f"which state of a hub id (default: {REVISION} of the default checkpoint)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps ... (default: auto, the fastest that is here)")
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help=f"default: auto, half precision where the device is fast at it, else float32; float32 with {EMOJI}",
    )
    add(
        "--on-flagged",
        choices=FLAG_NOTES,
        default="black",
        help="what becomes of a picture that the safety checker flags (default: black)",
    )
    add(
        "--batch",
        type=int_arg,
        default=4,
        metavar="N",
        help="variations made at a time; fewer need less memory (default: 4)",
    )
    return top


def vary(args: argparse.Namespace) -> None:
    """Make, save and report the variations; device, photos and names are checked before the checkpoint is loaded."""
    emoji = is_emoji(args.checkpoint)
    apply_defaults(args, emoji)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    pictures = [load_image(path) for path in args.photos]
    names = unique_names([path.stem for path in args.photos])
    seeds = range(args.seed, args.seed + args.n)
    if seeds[-1] > MAX_SEED:
        raise InputError(f"--seed {args.seed}: the last of {args.n} would be above {MAX_SEED}; a smaller would do")
    sheet = args.out / "contact-sheet.png"
    outputs = [sheet, *(args.out / f"{name}-{seed}.png" for name in names for seed in seeds)]
    check_folder(args.out)
    check_overwrites(args.photos, outputs)
    if emoji:
        print(f"imvar: {EMOJI_NOTICE}", file=sys.stderr)
        if args.size[0] and args.size != EMOJI_SIZE:
            print(
                f"imvar: {EMOJI} was trained at 64x64 pixels, and what it makes at other sizes is seldom a thing; "
                "the larger, the slower",
                file=sys.stderr,
            )
    pipe = load(args.checkpoint, args.revision, args.scheduler, dtype).to(device)
    args.out.mkdir(parents=True, exist_ok=True)

    rows = [SheetRow(path.name, picture) for path, picture in zip(args.photos, pictures, strict=True)]
    for row, name in zip(rows, names, strict=True):
        pipe.set_progress_bar_config(desc=name)
        for seed, picture, flagged in variations(pipe, row.photo, seeds, args):
            path, note = args.out / f"{name}-{seed}.png", ", flagged" if flagged else ""
            save(picture, path)
            row.variations.append((f"seed {seed}{note}", picture))
            print(f"{path}{note} by the safety checker{FLAG_NOTES[args.on_flagged]}" if flagged else path)

    scheduler = type(pipe.scheduler).__name__.removesuffix("Scheduler")
    footer = f"{args.steps} step{'s' * (args.steps > 1)} of {scheduler}, guidance {args.guidance:g}, {args.checkpoint}"
    save(contact_sheet(rows, footer), sheet)
    print(sheet, "(the variations beside the photos)")
    if pipe.safety_checker is None:
        print("imvar: this checkpoint has no safety checker, so none looked at the pictures", file=sys.stderr)


def check_folder(folder: Path) -> None:
    """Raise `InputError` where nothing can be written into a folder, or it cannot be made."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"-o {folder}: is, or lies in, a file; a folder would do")
    if not os.access(there, os.W_OK):
        raise InputError(f"-o {folder}: there is no permission to write in {there}; another folder would do")


def save(picture: Image, path: Path) -> None:
    """As PNG, whole or not at all: what had that name before stays if this fails."""
    atomic_write(path, lambda temporary: picture.save(temporary, "PNG"))


def apply_defaults(args: argparse.Namespace, emoji: bool) -> None:
    """Fill in what was not said and depends on the checkpoint: photos, steps and dtype."""
    args.steps = args.steps or (EMOJI_STEPS if emoji else STEPS)
    if emoji and args.dtype == "auto":  # so that pictures are those of the same lines in Python, on any machine
        args.dtype = "float32"
    if emoji and not args.photos:
        args.photos = list(bundled_examples(EMOJI).values())
    if not args.photos:
        hides = f"; {Path(EMOJI).absolute()} hides the bundled one here" if args.checkpoint == EMOJI else ""
        args.misused(f"no PHOTO came; name one or more, or --checkpoint {EMOJI}, which has drawings of its own{hides}")


def variations(
    pipe: StableDiffusionImageVariationPipeline, photo: Image, seeds: Sequence[int], args: argparse.Namespace
) -> Iterator[tuple[int, Image, bool]]:
    """Each seed with its variation and the safety checker's flag, made `args.batch` at a time."""
    height, width = args.size
    for first in range(0, len(seeds), args.batch):
        batch = seeds[first : first + args.batch]
        made: Any = pipe(
            photo,
            height,
            width,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            num_images_per_prompt=len(batch),
            seed=batch,
            on_flagged=args.on_flagged,
        )
        yield from zip(batch, made.images, made.nsfw_content_detected or [False] * len(batch), strict=True)


def load(
    checkpoint: str,
    revision: str | None,
    scheduler: str | None,
    dtype: torch.dtype,
) -> StableDiffusionImageVariationPipeline:
    """The checkpoint as a pipeline, with its own scheduler or the one that is named."""
    if Path(checkpoint).exists() and revision:
        raise InputError(f"--revision {revision}: what lies at {checkpoint} has no revisions; leave it out")
    revision = revision or (REVISION if checkpoint == CHECKPOINT else None)
    kind = StableDiffusionImageVariationPipeline
    if Path(checkpoint).is_file():  # the originals have no safety checker, which vary() will say
        pipe = kind.from_single_file(checkpoint, dtype=dtype, requires_safety_checker=False)
    else:
        pipe = kind.from_pretrained(checkpoint, revision=revision, dtype=dtype)
    if scheduler:
        chosen, changes = SCHEDULERS[scheduler]
        pipe.scheduler = chosen.from_config(pipe.scheduler.config, **changes)
    pipe.enable_vae_slicing()
    return pipe


def is_emoji(checkpoint: str) -> bool:
    """Whether this is the bundled checkpoint, rather than a folder or file of its name."""
    return checkpoint == EMOJI and not Path(checkpoint).exists()


def pick_device(name: str) -> torch.device:
    """The device of that name, tried out; for "auto" the fastest that is here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:  # torch raises either for what it was not built with
        raise InputError(f"--device {name}: not here, or not known to this torch; 'auto' or 'cpu' would do") from error
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; for "auto" half precision where the device computes in it natively."""
    if name == "float16" and device.type == "cpu":
        raise InputError(
            "--dtype float16: on a CPU about a hundred times slower than float32; float32, or bfloat16 "
            "where the CPU computes in it, would do"
        )
    if name != "auto":
        return DTYPES[name]
    native = {"cuda": torch.float16, "cpu": torch.bfloat16 if has_bfloat16() else torch.float32}
    return native.get(device.type, torch.float32)


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16, rather than imitating them."""
    look = getattr(torch.cpu, "get_capabilities", dict)  # newer than the oldest torch that imvar runs on
    return any(look().get(name) for name in ("avx512_bf16", "amx_bf16"))


def int_arg(text: str, least: int = 1, most: int = 10**6) -> int:
    if not text.isdecimal() or len(text) > 19 or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{short_repr(text)}: a whole number from {least} to {most} would do")
    return int(text)


def seed_arg(text: str) -> int:
    return int_arg(text, least=0, most=MAX_SEED)


def float_arg(text: str) -> float:
    try:
        if math.isfinite(number := float(text)):
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}: a finite number would do")


def size_arg(text: str) -> tuple[int, int]:
    """Height and width: (512, 512) of "512", (384, 512) of "384x512"."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) in range(8, 2**16, 8) for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r}: 512 or 384x512 would do; height first, multiples of 8 below 65536")
    return int(sides[0]), int(sides[-1])
