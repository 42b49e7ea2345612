"""The actions of `imvar batch`, with their arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ..choices import CHECKPOINT, EMOJI, EMOJI_STEPS, FLAG_NOTES, SCHEDULERS, STEPS
from .argument_types import (
    address_arg,
    fraction_arg,
    gpus_arg,
    guidance_arg,
    int_arg,
    part_arg,
    seed_arg,
    share_arg,
    size_arg,
)
from .command_parser import CommandParser, add_command, add_model_options

BATCH = "imvar batch"
PHOTOS_HELP = "folders, patterns, images, .jsonl, .tar, .parquet, s3:"
OUT_HELP = "the output folder of imvar batch run"
STATUSES = (
    "Exit status: 0 done, 1 too many errors or failure, 2 usage error or another environment, 70 workers die, 71 out "
    "of memory, 74 disk full, 75 files to be made again, 130 interrupted, 143 terminated."
)


def add_batch(commands: Any) -> None:
    command = add_command(
        commands,
        "batch",
        help="make variations of many images, by processes that may be killed",
        description="Make variations of many images, by one process or many, on one machine or several. They may be "
        "killed at any time, and the same command goes on; the files are equal in every byte.",
        arguments="ACTION ... [options]",
        example="imvar batch run photos -o variations -n 4 -j 2",
        epilog=STATUSES,
    )
    actions = command.add_subparsers(required=True, title="actions", metavar="ACTION", dest="action", prog=BATCH)
    for add in (add_run_action, add_join, add_status, add_verify, add_retry, add_extend):
        add(actions)
    command.commands, command.noun, command.usual = actions.choices, "action", "run"


def add_run_action(actions: Any) -> None:
    command = add_command(
        actions,
        "run",
        prog=BATCH,
        help="make variations of many images, or go on with them",
        description="Make variations of many images; the same command goes on where it ended.",
        arguments="PHOTOS ... -o OUT [options]",
        example="imvar batch run photos -o variations -j 2",
    )
    add = command.add_argument_group("images").add_argument
    add("photos", nargs="+", type=address_arg, metavar="PHOTOS", help=PHOTOS_HELP)
    add("-n", type=int_arg, default=4, metavar="N", help="variations of each input (default: 4)")
    add("--seed", type=seed_arg, default=0, metavar="S", help="what all seeds are derived from (default: 0)")
    seeds = "own: of each image its own (default); same: S + k"
    add("--seeds", choices=("own", "same"), default="own", metavar="HOW", help=seeds)
    add("--steps", type=int_arg, metavar="N", help=f"denoising steps (default: {STEPS}; {EMOJI_STEPS} with {EMOJI})")
    add("--guidance", type=guidance_arg, default=3.0, metavar="W", help="guidance scale (default: 3)")
    add("--size", type=size_arg, default=(None, None), metavar="N|HxW", help="multiples of 8 (default: as trained)")
    add("--scheduler", choices=SCHEDULERS, metavar="NAME", help=f"{', '.join(SCHEDULERS)}")
    add_conditions(add)
    add("--on-flagged", choices=FLAG_NOTES, default="black", metavar="HOW", help="black, blur or keep (default: black)")
    add = command.add_argument_group("output").add_argument
    add("-o", dest="out", required=True, type=address_arg, metavar="OUT", help="the folder of the batch, or s3://...")
    layouts = "files (default); tar or parquet: one file a shard"
    add("--format", choices=("files", "tar", "parquet"), default="files", metavar="F", help=layouts)
    add("--save", choices=("png", "webp", "jpeg"), default="png", metavar="F", help="png, webp or jpeg (default: png)")
    add("--no-metadata", action="store_true", help="save no record of how images were made")
    add("--shard", type=int_arg, default=64, metavar="N", help="inputs that are made as one (default: 64)")
    add = add_model_options(command, CHECKPOINT, is_brief=True)
    add("--batch", type=int_arg, default=4, metavar="N", help="rows of each call; it changes bytes (default: 4)")
    threads = "of each worker; it changes bytes (default: all cores)"
    add("--threads", type=int_arg, metavar="N", help=threads)
    add_workers(command, has_plan=True)


def add_join(actions: Any) -> None:
    command = add_command(
        actions,
        "join",
        prog=BATCH,
        help="work on a batch as one more process, anywhere",
        description="Work on a batch as one process, beside others on the same folder: of a SLURM array, a Kubernetes "
        "job, torchrun.",
        arguments="OUT [options]",
        example="imvar batch join variations",
    )
    add = command.add_argument
    add("out", type=address_arg, metavar="OUT", help=OUT_HELP)
    add_part(add)
    add_tries(add)
    add_printing(add)
    add("--until-stdin-ends", action="store_true", help=argparse.SUPPRESS)  # for the workers of `run`


def add_status(actions: Any) -> None:
    command = add_command(
        actions,
        "status",
        prog=BATCH,
        help="print how far a batch is",
        description="Print how far a batch is: shards, images and errors so far, and living workers.",
        arguments="OUT [options]",
        example="imvar batch status variations --watch",
    )
    add = command.add_argument
    add("out", type=address_arg, metavar="OUT", help=OUT_HELP)
    add("--watch", action="store_true", help="print it again whenever it changes, until all is done")
    add("--json", action="store_true", help="print it as JSON")
    command.set_defaults(quiet=False)


def add_verify(actions: Any) -> None:
    command = add_command(
        actions,
        "verify",
        prog=BATCH,
        help="compare every file with its digest",
        description="Compare every file with its digest, and print those that differ or are missing. The next run or "
        "join makes their shards again.",
        arguments="OUT",
        example="imvar batch verify variations",
    )
    command.add_argument("out", type=address_arg, metavar="OUT", help=OUT_HELP)


def add_retry(actions: Any) -> None:
    command = add_command(
        actions,
        "retry",
        prog=BATCH,
        help="make the shards with errors again",
        description="Make the shards with errors again, after the inputs were repaired.",
        arguments="OUT [options]",
        example="imvar batch retry variations -j 2",
    )
    command.add_argument("out", type=address_arg, metavar="OUT", help=OUT_HELP)
    add_workers(command)


def add_extend(actions: Any) -> None:
    command = add_command(
        actions,
        "extend",
        prog=BATCH,
        help="add inputs to a batch, and make them",
        description="Add inputs to a batch, with its settings, and make them.",
        arguments="OUT MORE ... [options]",
        example="imvar batch extend variations more -j 2",
    )
    add = command.add_argument_group("images").add_argument
    add("out", type=address_arg, metavar="OUT", help=OUT_HELP)
    add("photos", nargs="+", type=address_arg, metavar="MORE", help=PHOTOS_HELP)
    add_conditions(add)
    add_workers(command, has_plan=True)


def add_conditions(add: Callable[..., Any]) -> None:
    """Add the conditions that all inputs of a batch share."""
    add("--negative", type=address_arg, metavar="PHOTO", help="an image that guidance leads away from")
    add("--init", type=address_arg, metavar="PHOTO", help="start from this image instead of from noise")
    add(
        "--strength", type=fraction_arg, metavar="0..1", help="how much of --init changes (default: 0.8; 1 with --mask)"
    )
    add("--mask", type=address_arg, metavar="PHOTO", help="white where --init is repainted")


def add_workers(command: CommandParser, has_plan: bool = False) -> None:
    """Add the options about the processes that work on a batch; `has_plan`: the command writes its plan."""
    add = command.add_argument_group("workers").add_argument
    add("-j", dest="jobs", type=int_arg, metavar="N", help="processes (default: one, or one for each GPU)")
    add("--gpus", type=gpus_arg, metavar="0,1|all", help="the GPUs that the processes use in turn")
    add("--engine", choices=("local", "ray"), default="local", metavar="E", help="local (default), or ray: a cluster")
    add("--address", metavar="A", help="of a Ray cluster: auto or HOST:PORT (default: its own)")
    share = "the share of a GPU of a process on Ray (default: 1)"
    add("--gpus-per-worker", type=share_arg, default=1.0, metavar="G", help=share)
    if has_plan:
        plan_only = "write the plan, and leave the work to imvar batch join"
        add("--plan-only", action="store_true", help=plan_only)
    add_part(add)
    add_tries(add)
    errors = "share of errors that is a failure (default: 0.05)"
    add("--max-errors", type=fraction_arg, default=0.05, metavar="0..1", help=errors)
    add_printing(add)


def add_part(add: Callable[..., Any]) -> None:
    add("--part", type=part_arg, metavar="I/N", help="shards I, I + N, ... alone, for folders not shared")


def add_tries(add: Callable[..., Any]) -> None:
    tries = "deaths at an input that make it an error (default: 3)"
    add("--tries", type=int_arg, default=3, metavar="N", help=tries)


def add_printing(add: Callable[..., Any]) -> None:
    add("-q", "--quiet", action="store_true", help="print nothing but errors")
    add("--json", action="store_true", help="print the result as JSON")
