"""The parser of the command line: commands, their arguments, and the options that they share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from .. import __version__
from ..choices import CHECKPOINT, EMOJI, EMOJI_STEPS, FLAG_NOTES, SCHEDULERS, STEPS
from ..text import printable, short_repr
from .argument_types import (
    AXES,
    axis_arg,
    count_arg,
    folder_arg,
    fraction_arg,
    guidance_arg,
    int_arg,
    photo_arg,
    port_arg,
    seed_arg,
    size_arg,
    weighted_arg,
)
from .batch_parser import add_batch
from .command_parser import CommandParser, add_command, add_model_options
from .completion import SHELLS, PrintCompletion

PHOTO_HELP = "an image file, or an embedding in a .safetensors file"
OUTPUTS = (
    "Images are saved in FOLDER with a contact sheet of all, contact-sheet.png. Where a name exists, the new file is "
    "numbered: fox-0-2.png."
)
STATUS = "Exit status: 0 success, 1 failure, 2 usage error, 130 interrupted."


def command_parser() -> CommandParser:
    """Return the parser of the command line."""
    top = CommandParser(
        prog="imvar",
        usage="imvar COMMAND ... [options]",
        description="Image variations with Stable Diffusion.",
        epilog="Examples:\n"
        "  imvar vary photo.jpg\n"
        f"  imvar vary --checkpoint {EMOJI}    # needs no download\n"
        f"  imvar vary --help                      # its options\n\n{STATUS}",
    )
    top.add_argument("--version", action="version", version=f"imvar {__version__}", help="print the version and exit")
    shells = f"print a completion script for {', '.join(SHELLS)}"
    top.add_argument("--print-completion", action=PrintCompletion, choices=SHELLS, metavar="SHELL", help=shells)
    commands = top.add_subparsers(required=True, title="commands", metavar="COMMAND", dest="command", prog="imvar")
    for add in ADD_COMMANDS:
        add(commands)
    top.commands = commands.choices
    return top


def check_combinations(args: argparse.Namespace) -> None:
    """End with a usage error for options that need or exclude each other."""
    given = vars(args)
    varied = {args.rows[0], args.columns[0]} if "rows" in given else set()
    if "init" in given and args.init is None:
        has_strength = given.get("strength") is not None or "strength" in varied
        needs = {"--strength": has_strength, "--mask": args.mask is not None}
        for name in (name for name, is_given in needs.items() if is_given):
            args.usage_error(f"{name}: expected --init with it, got none")
    if "rows" in given and len(varied) == 1:
        args.usage_error(f"--columns: expected another option than --rows {args.rows[0]}, got the same")
    if given.get("revision"):
        check_revision(args, given.get("checkpoint") or given.get("source") or "")
    if given.get("gpus") and given.get("device") not in (None, "auto", "cuda"):
        args.usage_error(f"--gpus: expected --device cuda or auto with it, got {args.device}")
    if given.get("no_metadata") and given.get("skip_existing"):
        args.usage_error("--skip-existing: expected no --no-metadata with it, got both")
    if given.get("overwrite") and given.get("skip_existing"):
        args.usage_error("--skip-existing: expected no --overwrite with it, got both")
    photos = [*(given.get("photos") or ()), *(path for path, _ in given.get("weighted") or ())]
    if [str(path) for path in (*photos, *map(given.get, ("negative", "init", "mask")))].count("-") > 1:
        args.usage_error("-: expected standard input for one image, got it for several")


def check_revision(args: argparse.Namespace, checkpoint: str) -> None:
    """End with a usage error for the revision of a checkpoint that is not on the hub."""
    got = f"got {short_repr(args.revision)}"
    if os.path.exists(checkpoint):
        args.usage_error(f"--revision: expected none for the local checkpoint {printable(checkpoint)}, {got}")
    if checkpoint == EMOJI and args.revision != "main":
        args.usage_error(f"--revision: expected none for {EMOJI}, which comes with imvar in one revision, {got}")


def add_vary(commands: Any) -> None:
    command = add_command(
        commands,
        "vary",
        help="make variations of images",
        description="Make variations of each image, and a contact sheet of all.",
        arguments="[PHOTO ...] [options]",
        example="imvar vary photo.jpg -n 8 -o foxes",
        epilog=f"{EMOJI} is part of imvar and needs no download: a small model that makes 64 x 64 images in seconds, "
        "trained on drawings in the style of emoji, not on photographs. Without a PHOTO it varies its own drawings.\n"
        f"Variation k of a photo has seed S + k and is saved as PHOTO-SEED.png. {OUTPUTS}",
    )
    add = command.add_argument_group("images").add_argument
    photos = f"{PHOTO_HELP}; a folder, a pattern such as '*.jpg', or - for standard input"
    add("photos", nargs="*", type=photo_arg, metavar="PHOTO", help=photos)
    add("-n", type=int_arg, default=4, metavar="N", help="variations of each photo (default: 4)")
    add_image_options(command, add)


def add_mix(commands: Any) -> None:
    command = add_command(
        commands,
        "mix",
        help="make variations of several images at once",
        description="Make variations of the weighted sum of several image embeddings.",
        arguments="PHOTO=WEIGHT ... [options]",
        example="imvar mix fox.png=0.7 panda.png=0.3",
        epilog=f"Weights usually have the sum 1. {OUTPUTS}",
    )
    command.set_defaults(photos=None)
    add = command.add_argument_group("images").add_argument
    add("weighted", nargs="+", type=weighted_arg, metavar="PHOTO=WEIGHT", help=PHOTO_HELP)
    add("-n", type=int_arg, default=4, metavar="N", help="variations of the mixture (default: 4)")
    add_image_options(command, add)


def add_interpolate(commands: Any) -> None:
    command = add_command(
        commands,
        "interpolate",
        help="make images between two images",
        description="Make images along the spherical interpolation between two image embeddings, all of one seed.",
        arguments="A B [options]",
        example="imvar interpolate fox.png panda.png -n 5",
        epilog=OUTPUTS,
    )
    add = command.add_argument_group("images").add_argument
    for name in "A", "B":
        add("photos", action="append", type=photo_arg, metavar=name, help=PHOTO_HELP)
    add("-n", type=count_arg, default=9, metavar="N", help="images, both ends included (default: 9)")
    add_image_options(command, add)


def add_grid(commands: Any) -> None:
    command = add_command(
        commands,
        "grid",
        help="compare settings in a grid of images",
        description="Make an image for each combination of the values of two options.",
        arguments="PHOTO --rows OPTION=V,V [options]",
        example="imvar grid fox.png --rows guidance=1,3 --columns seed=0..5",
        epilog=OUTPUTS,
    )
    add = command.add_argument_group("images").add_argument
    add("photos", nargs=1, type=photo_arg, metavar="PHOTO", help=PHOTO_HELP)
    axes = f"values of {', '.join(AXES)}; of seed also LOW..HIGH"
    add("--rows", required=True, type=axis_arg, metavar="OPTION=V,V", help=axes)
    columns = ("seed", [0, 1, 2, 3])
    add("--columns", default=columns, type=axis_arg, metavar="OPTION=V,V", help="likewise (default: seed=0..3)")
    add_image_options(command, add)


def add_demo(commands: Any) -> None:
    command = add_command(
        commands,
        "demo",
        help="make variations of the drawings that come with imvar",
        description=f"Make variations of the drawings that come with {EMOJI}, which needs no download. With another "
        "--checkpoint, in a checkout of imvar: of the photos in tests/photos.",
        example="imvar demo -n 2",
        epilog=OUTPUTS,
    )
    add = command.add_argument_group("images").add_argument
    add("-n", type=int_arg, default=4, metavar="N", help="variations of each drawing (default: 4)")
    add_image_options(command, add, checkpoint=EMOJI, folder="out/demo")
    command.set_defaults(photos=[])


def add_info(commands: Any) -> None:
    command = add_command(
        commands,
        "info",
        help="print how an image was made",
        description="Print how images were made, by the records in their files, and the commands that make them again.",
        arguments="FILE ... [options]",
        example="imvar info fox-0.png",
    )
    add = command.add_argument
    add("files", nargs="+", type=photo_arg, metavar="FILE", help="an image that imvar made: PNG, WebP or JPEG")
    add("--json", action="store_true", help="print a JSON object for each file, on a line")


def add_again(commands: Any) -> None:
    command = add_command(
        commands,
        "again",
        help="make an image again from its record",
        description="Make an image again, equal in every pixel on the same machine, and compare both.",
        arguments="FILE --photo PHOTO [options]",
        example="imvar again fox-0.png --photo fox.png",
        epilog="imvar info FILE prints the command. Files may have any name: their pixels are compared with the "
        "recorded digests. Exit status 1: the image is not equal in every pixel and should be, or cannot be made.",
    )
    add = command.add_argument
    add("file", type=photo_arg, metavar="FILE", help="an image that imvar made: PNG, WebP or JPEG")
    photo = "the photo or embedding that was varied; of a mixture each"
    add("--photo", dest="photos", action="append", default=[], type=photo_arg, metavar="PHOTO", help=photo)
    add("--negative", type=photo_arg, metavar="PHOTO", help="the image that guidance led away from")
    add("--init", type=photo_arg, metavar="PHOTO", help="the image that it started from")
    add("--mask", type=photo_arg, metavar="PHOTO", help="the mask of what was repainted")
    checkpoint = "where it is, if not under the name in the record"
    add("--checkpoint", metavar="ID|PATH", help=checkpoint)
    add("-o", dest="out", type=folder_arg, default="variations", metavar="FOLDER", help="default: variations")
    add("--alone", action="store_true", help="make one image and not all of its batch: equal up to rounding")


def add_web(commands: Any) -> None:
    command = add_command(
        commands,
        "web",
        help="vary, mix and paint images on a page in the browser",
        description="Serve a page on which images are varied, mixed and painted.",
        example="imvar web --port 8000",
        epilog="Only this machine can open the page, except with --host. Ctrl-C ends it and deletes its files.\n"
        "It needs an extra: pip install 'imvar[web]', in a checkout pip install '.[web]'.",
    )
    add = command.add_argument_group("address").add_argument
    add("--host", default="127.0.0.1", metavar="H", help="the address to listen at (default: 127.0.0.1)")
    add("--port", type=port_arg, default=7860, metavar="N", help="0 for a free one (default: 7860)")
    add_model_options(command, EMOJI)


def add_convert(commands: Any) -> None:
    command = add_command(
        commands,
        "convert",
        help="convert a checkpoint to another layout or dtype",
        description="Convert a checkpoint of this model, a file or a folder in any known layout, to another layout or "
        "dtype. The tensors' names tell the layout.",
        arguments="SOURCE TARGET [options]",
        example="imvar convert original.ckpt converted --dtype fp16",
        epilog="The target is replaced at once and whole, after all checks; on a failure it is unchanged. Exit status "
        "1: failure, 2: invalid arguments, 130: interrupted.",
    )
    add = command.add_argument_group("checkpoints").add_argument
    source = "a folder in diffusers' layout of any age, the folder or file of one part, an original .ckpt or "
    source += ".safetensors file, or a hub id"
    add("source", metavar="SOURCE", help=source)
    add("target", metavar="TARGET", help="a folder, or a .safetensors file with --to original; replaced if it exists")
    add("--revision", metavar="R", help="of a hub id: branch, tag or commit")
    add("--fill", metavar="CHECKPOINT", help="take parts that SOURCE lacks, such as the safety checker, from here")
    add("--config", metavar="FOLDER", help="use the configs in this folder instead of those of SOURCE")

    add = command.add_argument_group("conversion").add_argument
    add(
        "--to",
        choices=("diffusers", "original"),
        default="diffusers",
        metavar="LAYOUT",
        help="diffusers (the default) or original",
    )
    dtypes = "of all floating-point tensors: keep (the default), fp32, fp16, bf16"
    add("--dtype", choices=("keep", "fp32", "fp16", "bf16"), default="keep", metavar="TYPE", help=dtypes)
    ema = "use the moving average of the UNet: yes, no or auto (the default, if there is one)"
    add("--ema", choices=("auto", "yes", "no"), default="auto", metavar="WHEN", help=ema)
    parts = "unet", "vae", "image_encoder", "safety_checker"
    add("--part", choices=parts, metavar="PART", help=f"convert one alone: {', '.join(parts)}")
    add("--max-shard-size", default="10GB", metavar="SIZE", help="split larger weights files (default: 10GB)")
    add("--dry-run", action="store_true", help="report what would be done, and write nothing")
    add("--verify", action="store_true", help="read the new files back and compare every bit")


def add_env(commands: Any) -> None:
    command = add_command(
        commands,
        "env",
        help="print versions and hardware, for a bug report",
        description="Print versions, hardware and settings, for a bug report: no path, user name or token.",
        example="imvar env --json",
    )
    command.add_argument("--json", action="store_true", help="as JSON")


def add_image_options(
    command: CommandParser, add: Callable[..., Any], checkpoint: str = CHECKPOINT, folder: str = "variations"
) -> None:
    """Add the options of the commands that make images; `add` adds to the group of those about the images."""
    add("--seed", type=seed_arg, default=0, metavar="S", help="seed of the first image (default: 0)")
    add("--steps", type=int_arg, metavar="N", help=f"denoising steps (default: {STEPS}; {EMOJI_STEPS} with {EMOJI})")
    add("--guidance", type=guidance_arg, default=3.0, metavar="W", help="guidance scale (default: 3)")
    add("--size", type=size_arg, default=(None, None), metavar="N|HxW", help="multiples of 8 (default: as trained)")
    schedulers = f"{', '.join(SCHEDULERS)} (default: the checkpoint's)"
    add("--scheduler", choices=SCHEDULERS, metavar="NAME", help=schedulers)
    add("--negative", type=photo_arg, metavar="PHOTO", help="an image that guidance leads away from")
    add("--init", type=photo_arg, metavar="PHOTO", help="start from this image instead of from noise")
    strength = "how much of --init changes (default: 0.8; 1 with --mask)"
    add("--strength", type=fraction_arg, metavar="0..1", help=strength)
    add("--mask", type=photo_arg, metavar="PHOTO", help="white where --init is repainted; the rest is kept")
    flagged = "black, blur or keep flagged images (default: black)"
    add("--on-flagged", choices=FLAG_NOTES, default="black", metavar="HOW", help=flagged)

    add = command.add_argument_group("output").add_argument
    add("-o", dest="out", type=folder_arg, default=folder, metavar="FOLDER", help=f"default: {folder}")
    add("--save", choices=("png", "webp", "jpeg"), default="png", metavar="F", help="png, webp or jpeg (default: png)")
    add("--no-metadata", action="store_true", help="save no record of how images were made")
    add("--overwrite", action="store_true", help="replace existing files of the same names")
    add("--skip-existing", action="store_true", help="keep existing images, if they are those of this command")
    add("-q", "--quiet", action="store_true", help="print nothing but errors")
    add("--json", action="store_true", help="print an object for each image in place of its path")

    add = add_model_options(command, checkpoint)
    add("--batch", type=int_arg, default=4, metavar="N", help="images at a time; fewer need less memory (default: 4)")


ADD_COMMANDS = (
    add_vary,
    add_mix,
    add_interpolate,
    add_grid,
    add_demo,
    add_info,
    add_again,
    add_web,
    add_batch,
    add_convert,
    add_env,
)
"""In the order of `imvar --help`."""
