"""Command line: `imvar vary PHOTO...` makes variations of photos, and a contact sheet of all of them."""

from __future__ import annotations

import argparse
import gc
import io
import math
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from . import __version__
from .atomic.file import atomic_write
from .contact_sheet import SheetRow, contact_sheet
from .errors import ImvarError, InputError, OutOfMemoryError, invalid, short_repr
from .image.load_image import load_image
from .malloc import keep_freed_memory
from .noise import MAX_SEED
from .oom import explain_out_of_memory
from .pipeline import StableDiffusionImageVariationPipeline
from .schedulers import DDIMScheduler, LMSDiscreteScheduler, PNDMScheduler
from .weights.bundled import bundled_examples

CHECKPOINT, REVISION = "lambdalabs/sd-image-variations-diffusers", "v2.0"
EMOJI = "imvar-emoji"
EMOJI_NOTICE = (
    f"{EMOJI} was trained on drawings in the style of emoji, of objects, animals, food, vehicles and faces, not on "
    f"photographs; for those use --checkpoint {CHECKPOINT}, a download of 6 GB"
)
EMOJI_SIZE = (64, 64)
STEPS, EMOJI_STEPS = 50, 20
FLAG_NOTES = {"black": " and replaced by a black image", "blur": " and blurred", "keep": ""}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEDULERS = {  # with config changes: some published configs leave clip_sample on, which degrades latents
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),  # as published
    "lms": (LMSDiscreteScheduler, {}),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 success, 1 failure, 2 usage error, 130 interrupted by Ctrl-C."""
    if argv is None:  # run as a program
        gc.freeze()  # imported modules are never garbage: keep collections, also the one at exit, from traversing them
    args = parser().parse_args(argv)
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal's encoding may lack characters of file names
    try:
        with explain_out_of_memory():
            vary(args)
    except OutOfMemoryError:
        print("imvar: out of memory; use --batch 1 or a smaller --size", file=sys.stderr)
    except (ImvarError, OSError) as error:
        print(f"imvar: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("imvar: interrupted", file=sys.stderr)
        return 130  # the shells' convention
    else:
        return 0
    return 1


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(prog="imvar", description="Image variations with Stable Diffusion.")
    top.add_argument("--version", action="version", version=f"imvar {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "vary",
        help="make variations of images",
        description="Make variations of each image, and one contact sheet of the images and their variations.",
        epilog=f"The checkpoint {EMOJI} is part of imvar and needs no download: a small model that makes 64 x 64 "
        "images in seconds. It was trained on drawings in the style of emoji, not on photographs. Without a PHOTO it "
        "varies its example drawings. "
        "Variation k of a photo has seed S + k and is saved as PHOTO-SEED.png, the contact sheet as "
        "contact-sheet.png, in FOLDER, which is created if necessary; existing files of these names are replaced. "
        "Exit status: 0 success, 1 failure, 2 usage error, 130 interrupted.",
    )
    add = command.add_argument
    command.set_defaults(usage_error=command.error)
    add("photos", nargs="*", type=Path, metavar="PHOTO", help=f"JPEG, PNG or WebP (default with {EMOJI}: its drawings)")
    add("-n", type=int_arg, default=4, metavar="N", help="variations of each photo (default: 4)")
    add("-o", dest="out", type=Path, default="variations", metavar="FOLDER", help="output folder (default: variations)")
    add("--seed", type=seed_arg, default=0, metavar="S", help="seed of the first variation (default: 0)")
    add("--steps", type=int_arg, metavar="N", help=f"denoising steps (default: {STEPS}; {EMOJI_STEPS} with {EMOJI})")
    add("--guidance", type=float_arg, default=3.0, metavar="W", help="guidance scale (default: 3)")
    add("--size", type=size_arg, default=(None, None), metavar="N|HxW", help="multiples of 8 (default: as trained)")
    add("--scheduler", choices=SCHEDULERS, help="default: the scheduler of the checkpoint")
    add(
        "--checkpoint",
        default=CHECKPOINT,
        metavar="ID|FOLDER|FILE",
        help=f"a hub id, a folder in the published layout, an original .ckpt file, or {EMOJI} (default: {CHECKPOINT})",
    )
    add("--revision", help=f"branch, tag or commit of a hub id (default: {REVISION} of the default checkpoint)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps ... (default: auto, the fastest available)")
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help=f"default: auto, half precision where the device is fast at it, else float32; float32 with {EMOJI}",
    )
    add("--on-flagged", choices=FLAG_NOTES, default="black", help="what flagged images become (default: black)")
    add("--batch", type=int_arg, default=4, metavar="N", help="images at a time; fewer need less memory (default: 4)")
    return top


def vary(args: argparse.Namespace) -> None:
    """Make, save and report the variations; device, photos and names are checked before the checkpoint is loaded."""
    emoji = is_emoji(args.checkpoint)
    apply_defaults(args, emoji)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    photos = [load_image(path) for path in args.photos]
    names = unique_names([path.stem for path in args.photos])
    seeds = range(args.seed, args.seed + args.n)
    if seeds[-1] > MAX_SEED:
        raise invalid(InputError, "--seed", f"at most {MAX_SEED - args.n + 1} for {args.n} variations", str(args.seed))
    sheet = args.out / "contact-sheet.png"
    check_folder(args.out)
    check_overwrites(args.photos, [sheet, *(args.out / f"{name}-{seed}.png" for name in names for seed in seeds)])
    if emoji:
        print(f"imvar: {EMOJI_NOTICE}", file=sys.stderr)
        if args.size[0] and args.size != EMOJI_SIZE:
            print(
                f"imvar: {EMOJI} was trained at 64x64 pixels; at other sizes its images rarely show an object, and "
                "larger ones take longer",
                file=sys.stderr,
            )
    pipe = load_pipeline(args.checkpoint, args.revision, args.scheduler, dtype).to(device)
    args.out.mkdir(parents=True, exist_ok=True)

    rows = [SheetRow(path.name, photo) for path, photo in zip(args.photos, photos, strict=True)]
    for row, name in zip(rows, names, strict=True):
        pipe.set_progress_bar_config(desc=name)
        for seed, image, flagged in variations(pipe, row.photo, seeds, args):
            path, note = args.out / f"{name}-{seed}.png", ", flagged" if flagged else ""
            atomic_write(path, partial(image.save, format="PNG"))
            row.variations.append((f"seed {seed}{note}", image))
            print(f"{path}{note} by the safety checker{FLAG_NOTES[args.on_flagged]}" if flagged else path)

    scheduler = type(pipe.scheduler).__name__.removesuffix("Scheduler")
    footer = f"{args.steps} step{'s' * (args.steps > 1)} of {scheduler}, guidance {args.guidance:g}, {args.checkpoint}"
    atomic_write(sheet, partial(contact_sheet(rows, footer).save, format="PNG"))
    print(sheet, "(the photos with their variations)")
    if pipe.safety_checker is None:
        print("imvar: this checkpoint has no safety checker; the images were not checked", file=sys.stderr)


def unique_names(stems: Sequence[str]) -> list[str]:
    """Return the names, numbered where they repeat; case does not distinguish them, as on some file systems."""
    names: list[str] = []
    for stem in stems:
        name, k = stem, 2
        while name.casefold() in map(str.casefold, names):
            name, k = f"{stem}-{k}", k + 1
        names.append(name)
    return names


def check_overwrites(photos: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Raise `InputError` if an output would overwrite a photo, or has the name of a folder."""
    sources = {os.path.realpath(path) for path in photos}
    for path in outputs:
        if (is_photo := os.path.realpath(path) in sources) or path.is_dir():
            got = "one of the photos" if is_photo else "a folder"
            raise invalid(InputError, path, "an output file", got, "use another -o FOLDER")


def check_folder(folder: Path) -> None:
    """Raise `InputError` if the output folder cannot be created or written to."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise invalid(InputError, "-o", "a folder", f"{folder} (it, or one of its parents, is a file)")
    if not os.access(existing, os.W_OK):
        raise invalid(InputError, "-o", "a writable folder", f"{folder} (no permission to write in {existing})")


def apply_defaults(args: argparse.Namespace, emoji: bool) -> None:
    """Fill in the options whose defaults depend on the checkpoint: photos, steps and dtype."""
    args.steps = args.steps or (EMOJI_STEPS if emoji else STEPS)
    if emoji and args.dtype == "auto":  # for the same images as from the Python API, on any machine
        args.dtype = "float32"
    if emoji and not args.photos:
        args.photos = list(bundled_examples(EMOJI).values())
    if not args.photos:
        path = Path(EMOJI).absolute()
        shadowed = f"; {path} takes precedence over the bundled checkpoint" if args.checkpoint == EMOJI else ""
        args.usage_error(
            f"PHOTO: expected at least one, got none; name one, or use --checkpoint {EMOJI}, which has example "
            f"drawings{shadowed}"
        )


def variations(
    pipe: StableDiffusionImageVariationPipeline, photo: Image, seeds: Sequence[int], args: argparse.Namespace
) -> Iterator[tuple[int, Image, bool]]:
    """Yield each seed, its variation and the safety checker's flag, computed `args.batch` at a time."""
    for first in range(0, len(seeds), args.batch):
        batch = seeds[first : first + args.batch]
        output: Any = pipe(
            photo,
            *args.size,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            num_images_per_prompt=len(batch),
            seed=batch,
            on_flagged=args.on_flagged,
        )
        yield from zip(batch, output.images, output.nsfw_content_detected or [False] * len(batch), strict=True)


def load_pipeline(
    checkpoint: str, revision: str | None, scheduler: str | None, dtype: torch.dtype
) -> StableDiffusionImageVariationPipeline:
    """Return the pipeline of a checkpoint, with its own scheduler or the named one."""
    if Path(checkpoint).exists() and revision:
        raise invalid(InputError, "--revision", f"none for the local checkpoint {checkpoint}", revision)
    revision = revision or (REVISION if checkpoint == CHECKPOINT else None)
    pipeline_cls = StableDiffusionImageVariationPipeline
    if Path(checkpoint).is_file():  # original files have no safety checker; vary() says so
        pipe = pipeline_cls.from_single_file(checkpoint, dtype=dtype, requires_safety_checker=False)
    else:
        pipe = pipeline_cls.from_pretrained(checkpoint, revision=revision, dtype=dtype)
    if scheduler:
        scheduler_cls, changes = SCHEDULERS[scheduler]
        pipe.scheduler = scheduler_cls.from_config(pipe.components["scheduler"].config, **changes)
    pipe.enable_vae_slicing()
    return pipe


def is_emoji(checkpoint: str) -> bool:
    """Return whether this names the bundled checkpoint, not a folder or file of the same name."""
    return checkpoint == EMOJI and not Path(checkpoint).exists()


def pick_device(name: str) -> torch.device:
    """Return the device of that name after allocating on it; for "auto" the fastest available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without this backend
        expected = "'auto', 'cpu' or another device that this machine and PyTorch have"
        raise invalid(InputError, "--device", expected, short_repr(name)) from error
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of that name; for "auto" half precision if the device supports it natively."""
    if name == "float16" and device.type == "cpu":
        expected = "float32 on a CPU, or bfloat16 if the CPU has instructions for it"
        raise invalid(InputError, "--dtype", expected, "float16, which is about a hundred times slower")
    if name != "auto":
        return DTYPES[name]
    native = {"cuda": torch.float16, "cpu": torch.bfloat16 if has_bfloat16() else torch.float32}
    return native.get(device.type, torch.float32)


def has_bfloat16() -> bool:
    """Return whether this CPU has bfloat16 instructions, so that bfloat16 is not emulated."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # missing in the oldest supported PyTorch
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def int_arg(text: str, low: int = 1, high: int = 10**6) -> int:
    """Parse an integer from `low` to `high`."""
    if not text.isdecimal() or len(text) > 19 or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"expected an integer from {low} to {high}, got {short_repr(text)}")
    return int(text)


seed_arg = partial(int_arg, low=0, high=MAX_SEED)


def float_arg(text: str) -> float:
    """Parse a finite number."""
    try:
        if math.isfinite(number := float(text)):
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a finite number, got {short_repr(text)}")


def size_arg(text: str) -> tuple[int, int]:
    """Parse height and width: "512" is (512, 512), "384x512" is (384, 512)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) in range(8, 2**16, 8) for side in sides):
        expected = "512 or 384x512 (height first), multiples of 8 below 65536"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {short_repr(text)}")
    return int(sides[0]), int(sides[-1])
