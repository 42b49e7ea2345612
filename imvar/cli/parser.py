"""The parser of the command line: commands, their arguments, and the options that they share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import __version__
from .argument_types import axis_arg, count_arg, float_arg, int_arg, seed_arg, size_arg, weighted_arg
from .choices import CHECKPOINT, DTYPES, EMOJI, EMOJI_STEPS, FLAG_NOTES, REVISION, SCHEDULERS, STEPS

PHOTO_HELP = "JPEG, PNG or WebP, or an embedding in a .safetensors file"
OUTPUTS = (
    "Images are saved with a contact sheet, contact-sheet.png, in FOLDER, which is created if necessary; existing "
    "files of these names are replaced. Exit status: 0 success, 1 failure, 2 usage error, 130 interrupted."
)


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(prog="imvar", description="Image variations with Stable Diffusion.")
    top.add_argument("--version", action="version", version=f"imvar {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in ADD_COMMANDS:
        add(commands)
    return top


def add_command(commands: Any, name: str, **texts: str) -> argparse.ArgumentParser:
    """Add a command, which `run(args)` of the module `imvar/cli/NAME.py` runs; the module is imported then."""
    command = commands.add_parser(name, **texts)
    command.set_defaults(usage_error=command.error)
    return command


def add_vary(commands: Any) -> None:
    command = add_command(
        commands,
        "vary",
        help="make variations of images",
        description="Make variations of each image, and one contact sheet of the images and their variations.",
        epilog=f"The checkpoint {EMOJI} is part of imvar and needs no download: a small model that makes 64 x 64 "
        "images in seconds. It was trained on drawings in the style of emoji, not on photographs. Without a PHOTO it "
        "varies its example drawings. "
        f"Variation k of a photo has seed S + k and is saved as PHOTO-SEED.png. {OUTPUTS}",
    )
    photos = f"{PHOTO_HELP} (default with {EMOJI}: its drawings)"
    command.add_argument("photos", nargs="*", type=Path, metavar="PHOTO", help=photos)
    add_count(command, "variations of each photo")
    add_call_options(command)
    add_model_options(command)


def add_mix(commands: Any) -> None:
    command = add_command(
        commands,
        "mix",
        help="make variations of several images at once",
        description="Make variations of the weighted sum of several image embeddings.",
        epilog=f"Example: imvar mix fox.png=0.7 panda.png=0.3. Weights usually have the sum 1. {OUTPUTS}",
    )
    command.add_argument("weighted", nargs="+", type=weighted_arg, metavar="PHOTO=WEIGHT", help=PHOTO_HELP)
    add_count(command, "variations of the mixture")
    command.set_defaults(photos=None)
    add_call_options(command)
    add_model_options(command)


def add_interpolate(commands: Any) -> None:
    command = add_command(
        commands,
        "interpolate",
        help="make images between two images",
        description="Make images along the spherical interpolation between two image embeddings, all of one seed.",
        epilog=OUTPUTS,
    )
    for name in "A", "B":
        command.add_argument("photos", action="append", type=Path, metavar=name, help=PHOTO_HELP)
    command.add_argument("-n", type=count_arg, default=9, metavar="N", help="images, both ends included (default: 9)")
    add_call_options(command)
    add_model_options(command)


def add_grid(commands: Any) -> None:
    command = add_command(
        commands,
        "grid",
        help="compare settings in a grid of images",
        description="Make an image for each combination of the values of two options.",
        epilog=f"Example: imvar grid fox.png --rows guidance=1,3,7.5 --columns seed=0..5. {OUTPUTS}",
    )
    command.add_argument("photos", nargs=1, type=Path, metavar="PHOTO", help=PHOTO_HELP)
    axis = "OPTION=V,V,... or seed=LOW..HIGH; options: guidance, steps, seed, scheduler, strength, rescale"
    command.add_argument("--rows", required=True, type=axis_arg, metavar="OPTION=VALUES", help=axis)
    command.add_argument(
        "--columns", default=("seed", [0, 1, 2, 3]), type=axis_arg, metavar="OPTION=VALUES", help="(default: seed=0..3)"
    )
    add_call_options(command)
    add_model_options(command)


def add_count(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("-n", type=int_arg, default=4, metavar="N", help=f"{what} (default: 4)")


def add_call_options(command: argparse.ArgumentParser) -> None:
    """Add the options of the pipeline's calls."""
    add = command.add_argument
    add("-o", dest="out", type=Path, default="variations", metavar="FOLDER", help="output folder (default: variations)")
    add("--seed", type=seed_arg, default=0, metavar="S", help="seed of the first image (default: 0)")
    add("--steps", type=int_arg, metavar="N", help=f"denoising steps (default: {STEPS}; {EMOJI_STEPS} with {EMOJI})")
    add("--guidance", type=float_arg, default=3.0, metavar="W", help="guidance scale (default: 3)")
    add("--negative", type=Path, metavar="PHOTO", help="an image that guidance leads away from")
    add("--init", type=Path, metavar="PHOTO", help="start from this image instead of from noise")
    add(
        "--strength",
        type=float_arg,
        metavar="S",
        help="0 to 1, how much of --init changes (default: 0.8; 1 with --mask)",
    )
    add("--mask", type=Path, metavar="PHOTO", help="what of --init is repainted: white; the rest is kept")
    add("--size", type=size_arg, default=(None, None), metavar="N|HxW", help="multiples of 8 (default: as trained)")
    add("--scheduler", choices=SCHEDULERS, help="default: the scheduler of the checkpoint")
    add("--on-flagged", choices=FLAG_NOTES, default="black", help="what flagged images become (default: black)")
    add("--batch", type=int_arg, default=4, metavar="N", help="images at a time; fewer need less memory (default: 4)")


def add_model_options(command: argparse.ArgumentParser) -> None:
    """Add the options that select the checkpoint, and where and how it runs."""
    add = command.add_argument
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


ADD_COMMANDS = (
    add_vary,
    add_mix,
    add_interpolate,
    add_grid,
)
"""In the order of `imvar --help`."""
