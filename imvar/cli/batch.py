"""`imvar batch`: variations of many images, by processes that may be killed and share the work."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from .. import batch
from ..batch.bucket import absolute, location
from ..batch.driver import check_engine, gpu_list
from ..batch.exits import (
    DONE,
    FULL_DISK,
    INTERRUPTED,
    MISUSED,
    OUT_OF_MEMORY,
    TERMINATED,
    TO_BE_MADE_AGAIN,
    TOO_MANY_ERRORS,
    BatchError,
)
from ..batch.finish import Report, batch_report, reopen_errors, spoiled_files, spoiled_summaries
from ..batch.shard import StoppedError
from ..batch.store import FULL, FullDiskError, Store
from ..batch.worker import PartOf, Stop, work
from ..batch.workers import worker_of
from ..errors import CheckpointError, ImvarError, InputError, OutOfMemoryError, invalid, short_repr
from .printer import Printer

WATCH = 2.0  # seconds
MINUTE = 60.0  # seconds between lines in a log
SETTINGS = ("checkpoint", "revision", "scheduler", "dtype", "device", "threads", "n", "seed", "seeds", "steps")
SETTINGS += ("guidance", "on_flagged", "batch", "shard", "format", "save")
SIGNALS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
OF_ENGINE = ("engine", "address", "gpus_per_worker")
SHARED = ("negative", "init", "mask")


def run(args: argparse.Namespace) -> int:
    """Run one of the actions; see `imvar/batch/exits.py` for the exit status."""
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "run": run_action,
        "join": join_action,
        "status": status_action,
        "verify": verify_action,
        "retry": retry_action,
        "extend": extend_action,
    }
    previous = end_by_signals("" if args.action in ("status", "verify") else "; the workers finish their present calls")
    try:
        if "engine" in args:
            check_engine(args.engine, args.address, args.gpus, args.gpus_per_worker)
        return actions[args.action](args)
    except OutOfMemoryError as error:
        return fail(OUT_OF_MEMORY, error)
    except FullDiskError as error:
        return fail(FULL_DISK, error)
    except BatchError as error:
        return fail(error.status, error)
    except (InputError, OSError) as error:
        cause = error.__cause__ if isinstance(error, CheckpointError) else error
        if isinstance(cause, OSError) and cause.errno in FULL:
            return fail(FULL_DISK, error)
        if isinstance(error, OSError) and error.errno in READ_ONLY:
            got = f"{error.strerror} at {error.filename}"
            return fail(MISUSED, invalid(InputError, str(args.out), "a folder that can be written to", got))
        if not isinstance(error, (InputError, CheckpointError)):
            raise
        return fail(MISUSED, error)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_by_signals(notice: str) -> dict[int, Any]:
    """Leave the command on a signal with the shells' status for it, and return the previous handlers.

    The `finally` blocks come after the message with its `notice`, and a second signal ends them.
    """

    def leave(number: int, _: Any) -> None:
        start = "\n" if sys.stderr.isatty() else ""  # after the progress
        print(f"{start}imvar: {SIGNALS[number]}{notice}", file=sys.stderr)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        return {}
    heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as shells' background jobs
    return {number: signal.signal(number, leave) for number in heeded}


def fail(status: int, error: Exception) -> int:
    """Print an error, and return the exit status."""
    print(f"imvar: {error}", file=sys.stderr)
    return status


def run_action(args: argparse.Namespace) -> int:
    if not args.plan_only:
        gpu_list(args.gpus)  # which raises an error before there is a plan
    plan = batch.plan(args.photos, args.out, shared=shared_conditions(args), **plan_settings(args))
    return drive_batch(args, plan)


def extend_action(args: argparse.Namespace) -> int:
    return drive_batch(args, batch.extend(args.out, args.photos, shared=shared_conditions(args)))


def retry_action(args: argparse.Namespace) -> int:
    plan = batch.open_plan(args.out)
    numbers = reopen_errors(Store(plan.folder.parent), plan)
    if not args.quiet:
        print(f"imvar: shards with errors, which are made again: {len(numbers)}", file=sys.stderr)
    return drive_batch(args, plan)


def plan_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the plan that the options select."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    return settings | {"height": args.size[0], "width": args.size[1], "metadata": not args.no_metadata}


def shared_conditions(args: argparse.Namespace) -> dict[str, Any]:
    """Return the conditions of all items, with absolute paths."""
    files = {name: absolute(location(f"--{name}", path)) for name in SHARED if (path := getattr(args, name))}
    for name, path in files.items():  # in a shard, it would be an error of every input
        if not path.is_file():
            raise invalid(InputError, f"--{name}", "an image file", short_repr(str(getattr(args, name))))
    paths = {name: str(path) for name, path in files.items()}
    return paths | ({} if args.strength is None else {"strength": args.strength})


def drive_batch(args: argparse.Namespace, plan: batch.Plan) -> int:
    """Work on a batch with worker processes, and print what it has made."""
    if vars(args).get("plan_only"):
        print_report(args, batch_report(Store(plan.folder.parent), plan))
        return DONE
    progress = None if args.quiet or args.json else BatchProgress() if sys.stderr.isatty() else BatchLog()
    try:
        options = {name: getattr(args, name) for name in ("jobs", "gpus", "part", "tries", *OF_ENGINE)}
        with Printer(args.quiet):
            made = batch.drive(plan.folder.parent, **options, progress=progress)
    finally:
        if progress:
            progress.replace_line("")
    print_report(args, made)
    if made.errors <= args.max_errors * made.inputs:
        return DONE
    expected, hint = f"at most {args.max_errors:.4g} of {made.inputs} inputs", f"see {made.errors_file}"
    return fail(TOO_MANY_ERRORS, invalid(ImvarError, "errors", expected, str(made.errors), hint))


class BatchProgress:
    """A line on a terminal that says how far a batch is."""

    def __init__(self) -> None:
        self.start, self.first = time.monotonic(), -1

    def __call__(self, made: Report) -> None:
        self.first = made.done if self.first < 0 else self.first
        text = status_line(made)
        if made.done > self.first:
            seconds = (time.monotonic() - self.start) / (made.done - self.first) * (made.shards - made.done)
            text += f", {time_left(seconds)} left"
        self.replace_line(text)

    def replace_line(self, text: str) -> None:
        """Replace the line, cut to the width of the terminal."""
        print(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)


class BatchLog(BatchProgress):
    """The same as lines, for files in which it is read later: at most one a minute."""

    def __init__(self) -> None:
        super().__init__()
        self.last = self.start

    def replace_line(self, text: str) -> None:
        if text and time.monotonic() - self.last >= MINUTE:
            self.last = time.monotonic()
            print(f"imvar: {text}", file=sys.stderr, flush=True)


def time_left(seconds: float) -> str:
    """Return a time in its two largest units."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    return f"{hours} h" if hours > 9 else f"{minutes} min" if minutes > 1 else f"{round(seconds)} s"


def status_line(made: Report) -> str:
    """Return how far a batch is, in a line."""
    flagged = f" ({made.flagged} flagged)" if made.flagged else ""
    errors = f", {counted(made.errors, 'error')}" if made.errors else ""
    return f"{made.done}/{made.shards} shards, {counted(made.made, 'image')}{flagged}{errors}"


def counted(number: int, name: str) -> str:
    """Return a number with what it counts: "1 image", "2 images"."""
    return f"{number} {name}{'s' * (number != 1)}"


def print_report(args: argparse.Namespace, made: Report, workers: int | None = None) -> None:
    """Print what a batch has made, and the number of its workers, as a line or as JSON."""
    if args.json:
        files = {"manifest": made.manifest, "errors_file": made.errors_file}
        existing = {name: str(path) if path.exists() else None for name, path in files.items()}
        print(json.dumps(asdict(made) | existing | ({} if workers is None else {"workers": workers})))
    elif not args.quiet:
        tail = "" if workers is None else f", {counted(workers, 'worker')}"
        is_whole = made.done == made.shards and made.manifest.exists()
        files = [made.manifest, *([made.errors_file] if made.errors else [])]
        print(status_line(made) + tail + (f": {', '.join(map(str, files))}" if is_whole else ""))


def join_action(args: argparse.Namespace) -> int:
    """Work on a batch until it is done, or until a signal, or until standard input ends."""
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop.handle)
    if args.until_stdin_ends:
        threading.Thread(target=wait_for_end_of_stdin, daemon=True).start()
    use_gpu_of_rank()
    part = PartOf.from_text(args.part) if args.part else PartOf()
    try:
        work(args.out, part=part, stop=stop, tries=args.tries)
    except StoppedError:
        return INTERRUPTED if stop.signal == signal.SIGINT else TERMINATED
    if not args.until_stdin_ends:
        plan = batch.open_plan(args.out)
        print_report(args, batch_report(Store(plan.folder.parent), plan))
    return DONE


def use_gpu_of_rank() -> None:
    """Leave one GPU visible, for a rank of torchrun or accelerate, whose processes see all of them."""
    rank, visible = os.environ.get("LOCAL_RANK", ""), os.environ.get("CUDA_VISIBLE_DEVICES")
    if rank.isdecimal():
        gpus = visible.split(",") if visible else [str(k) for k in range(torch.cuda.device_count())]
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(rank) % len(gpus)]


def wait_for_end_of_stdin() -> None:
    """Ask for the end, by a signal, once the process that holds the other end of standard input is gone."""
    while os.read(0, 1):
        pass
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    else:
        signal.raise_signal(signal.SIGTERM)


def status_action(args: argparse.Namespace) -> int:
    plan = batch.open_plan(args.out)
    store = Store(plan.folder.parent)
    last = None
    while True:
        workers = worker_of(store.folder).alive()
        found = batch_report(store, plan), None if workers is None else len(workers)
        if found != last:
            print_report(args, found[0], workers=found[1])
            sys.stdout.flush()
        if not args.watch or found[0].done == found[0].shards:
            return DONE
        last = found
        time.sleep(WATCH)


def verify_action(args: argparse.Namespace) -> int:
    """Compare every file with its digest; shards with another one are made again by the next run."""
    plan = batch.open_plan(args.out)
    store, spoiled = Store(plan.folder.parent), 0
    for number, name in spoiled_files(store, plan):
        print(name)
        store.reopen(number)
        spoiled += 1
    if not spoiled and (made := batch_report(store, plan)).done == made.shards:
        names = spoiled_summaries(store, plan)
        print(*names, sep="\n", end="\n" if names else "")
        spoiled = len(names)
    if not spoiled:
        return DONE
    hint = "the next imvar batch run, join or retry writes them again"
    error = invalid(ImvarError, "files", "the bytes that were written", f"{spoiled} with other bytes or missing", hint)
    return fail(TO_BE_MADE_AGAIN, error)
