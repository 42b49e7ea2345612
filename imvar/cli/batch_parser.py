"""The actions of `imvar batch`, with their arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ..choices import CHECKPOINT, EMOJI, EMOJI_STEPS, FLAG_NOTES, SCHEDULERS, STEPS
from .argument_types import float_arg, folder_arg, int_arg, photo_arg, seed_arg, size_arg
from .command_parser import CommandParser, add_command, add_model_options

BATCH = "imvar batch"
TRIES_HELP = "deaths of a process at one input alone that make it an error (default: 3)"


def add_batch(commands: Any) -> None:
    command = add_command(
        commands,
        "batch",
        help="make variations of many images, by processes that may be killed",
        description="Make variations of many images: on one machine or several, killed and resumed, equal in every "
        "byte.",
        arguments="ACTION ... [options]",
        example="imvar batch run photos -o variations -n 4 -j 2",
        epilog="Exit status: 0 done, 1 too many errors, 2 usage or another environment, 70 workers die, 71 out of "
        "memory, 74 disk full, 75 files to be made again, 130 or 143 stopped.",
    )
    actions = command.add_subparsers(required=True, title="actions", metavar="ACTION", dest="action", prog=BATCH)
    add_batch_run(actions)
    out = "the output folder of imvar batch run"
    texts = {
        "join": ("work on a batch as one process: of a SLURM array, a Kubernetes job, torchrun", "join variations"),
        "status": ("print how far a batch is", "status variations --watch"),
        "verify": ("compare every file with its digest", "verify variations"),
        "retry": ("make the shards with errors again", "retry variations -j 2"),
        "extend": ("add inputs to a batch, and make them", "extend variations more -j 2"),
    }
    for name, (help_text, example) in texts.items():
        sentence = f"{help_text[0].upper()}{help_text[1:]}."
        action = add_command(
            actions,
            f"{name}",
            help=help_text,
            description=sentence,
            example=f"imvar batch {example}",
            arguments="OUT MORE ... [options]" if name == "extend" else "OUT [options]",
        )
        add = action.add_argument
        add("out", type=folder_arg, metavar="OUT", help=out)
        if name == "extend":
            add("photos", nargs="+", type=photo_arg, metavar="MORE", help="inputs, as of imvar batch run")
            add_conditions(add)
        if name == "status":
            add("--watch", action="store_true", help="print it every two seconds until the end")
        if name == "join":
            add("--until-stdin-ends", action="store_true", help=argparse.SUPPRESS)
            add_part(add)
            add("--tries", type=int_arg, default=3, metavar="N", help=TRIES_HELP)
        if name in ("retry", "extend"):
            add_workers(action)
        if name == "status":
            add("-q", "--quiet", action="store_true", help=argparse.SUPPRESS)
            add("--json", action="store_true", help="as JSON")
    command.commands = actions.choices


def add_batch_run(actions: Any) -> None:
    command = add_command(
        actions,
        "run",
        prog=BATCH,
        help="make variations of many images",
        description="Make variations of many images. The same command goes on with what was left, and ends with "
        "manifest.jsonl, a line for each image.",
        arguments="PHOTOS ... -o OUT [options]",
        example="imvar batch run photos -o variations -j 2",
    )
    add = command.add_argument_group("images").add_argument
    photos = "folders, with their folders; patterns; images; lists (.jsonl), .tar and .parquet files"
    add("photos", nargs="+", type=photo_arg, metavar="PHOTOS", help=photos)
    add("-n", type=int_arg, default=4, metavar="N", help="variations of each input (default: 4)")
    add("--seed", type=seed_arg, default=0, metavar="S", help="what seeds are derived from (default: 0)")
    seeds = "own: of each image its own (default); same: S + k for variation k of every input"
    add("--seeds", choices=("own", "same"), default="own", metavar="HOW", help=seeds)
    add("--steps", type=int_arg, metavar="N", help=f"denoising steps (default: {STEPS}; {EMOJI_STEPS} with {EMOJI})")
    add("--guidance", type=float_arg, default=3.0, metavar="W", help="guidance scale (default: 3)")
    add("--size", type=size_arg, default=(None, None), metavar="N|HxW", help="multiples of 8 (default: as trained)")
    add("--scheduler", choices=SCHEDULERS, metavar="NAME", help=f"{', '.join(SCHEDULERS)}")
    add_conditions(add)
    add("--on-flagged", choices=FLAG_NOTES, default="black", metavar="HOW", help="black, blur or keep (default: black)")
    add = command.add_argument_group("output").add_argument
    add("-o", dest="out", required=True, type=folder_arg, metavar="OUT", help="the folder of the batch")
    add("--format", choices=("files", "tar"), default="files", metavar="F", help="files (default), or a tar a shard")
    add("--save", choices=("png", "webp", "jpeg"), default="png", metavar="F", help="png, webp or jpeg (default: png)")
    add("--no-metadata", action="store_true", help="save no record of how images were made")
    add("--shard", type=int_arg, default=64, metavar="N", help="inputs that are made as one (default: 64)")
    add = add_model_options(command, CHECKPOINT)
    add("--batch", type=int_arg, default=4, metavar="N", help="rows of each call; it changes bytes (default: 4)")
    add("--threads", type=int_arg, metavar="N", help="of each worker; it changes bytes (default: all cores)")
    add_workers(command)


def add_conditions(add: Callable[..., Any]) -> None:
    """Add the conditions that all inputs of a batch share."""
    add("--negative", type=photo_arg, metavar="PHOTO", help="an image that guidance leads away from")
    add("--init", type=photo_arg, metavar="PHOTO", help="start from this image instead of from noise")
    add("--strength", type=float_arg, metavar="0..1", help="how much of --init changes (default: 0.8; 1 with --mask)")
    add("--mask", type=photo_arg, metavar="PHOTO", help="white where --init is repainted")


def add_workers(command: CommandParser) -> None:
    """Add the options about the processes that work on a batch."""
    add = command.add_argument_group("workers").add_argument
    add("-j", dest="jobs", type=int_arg, metavar="N", help="processes (default: one, or one for each GPU)")
    add("--gpus", metavar="0,1|all", help="the GPUs that the processes use in turn")
    add_part(add)
    add("--tries", type=int_arg, default=3, metavar="N", help=TRIES_HELP)
    errors = "share of inputs with errors above which the exit status is 1 (default: 0.05)"
    add("--max-errors", type=float_arg, default=0.05, metavar="0..1", help=errors)
    add("-q", "--quiet", action="store_true", help="print nothing but errors")
    add("--json", action="store_true", help="print the result as JSON")


def add_part(add: Callable[..., Any]) -> None:
    add("--part", metavar="I/N", help="only shards I, I + N, ..., for processes that share no folder")
