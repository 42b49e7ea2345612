"""The pipeline of a batch, and what the bytes of its images depend on besides the plan.

The first worker writes that as `plan/environment.json`: versions, device, dtypes, threads, scheduler and the digest of
the weights, as records have them. The others refuse to work where one of these differs.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import Any

import torch
from PIL import Image

from .. import loading
from ..atomic.file import sync
from ..errors import InputError, first_line, invalid
from ..records.record import Record, differences
from ..records.schema import SCHEMA, check_entry
from .bucket import BucketPath
from .conditions import BLANK
from .inputs import import_pyarrow
from .planning import ENVIRONMENT, Plan
from .processes import process_name
from .settings import Settings

OF_ROW = ("seed", "inputs", "call", "exact", "reasons", "flagged")
"""Entries of a record that are not the same for all images of a batch."""
UNIMPORTANT = ("checkpoint.name", "checkpoint.revision", "checkpoint.commit")
"""Entries that change nothing where the weights are equal."""
ANY_MACHINE: Record = {"device": "auto", "dtype": {}, "threads": None}


def pipeline_of(plan: Plan) -> Any:
    """Return the pipeline of a plan on this machine; device, dtype and threads are those of the first worker.

    Raises `InputError` if images would differ from those of the other workers: another version, device, dtype or
    digest of the weights.
    """
    recorded = read_environment(plan)
    pipe = load_of_settings(plan.settings, recorded["machine"] if recorded else ANY_MACHINE)
    check_environment(plan, pipe)
    return pipe


def load_of_settings(settings: Settings, machine: Record = ANY_MACHINE) -> Any:
    """Return the pipeline of settings, and set the threads; `machine`: that of a record, for what they leave open."""
    if threads := settings.threads or machine["threads"]:
        torch.set_num_threads(threads)
    device = loading.pick_device(machine["device"] if settings.device == "auto" else settings.device)
    auto = machine["dtype"].get("unet", "auto")
    dtype = loading.pick_dtype(auto if settings.dtype == "auto" else settings.dtype, device)
    pipe = loading.load_pipeline(settings.checkpoint, settings.revision, settings.scheduler, dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_environment(plan: Plan, pipe: Any) -> None:
    """Write the environment of a pipeline to the plan, if it is the first one; raise `InputError` if it differs."""
    here = environment_of(plan, pipe)
    path = plan.folder / ENVIRONMENT
    content = json.dumps(here, indent=1, sort_keys=True) + "\n"
    if isinstance(path, BucketPath):
        path.put_new(content.encode())
    elif not path.exists():
        temporary = path.with_name(f".{ENVIRONMENT}.{process_name()}.tmp")
        try:
            temporary.write_text(content, encoding="utf-8")
            sync(temporary)
            try:
                os.link(temporary, path)
            except FileExistsError:  # another worker was the first one
                pass
            except OSError:  # a file system without hard links
                temporary.replace(path)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
    differing = [line for line in differences(read_environment(plan) or {}, here) if not line.startswith(UNIMPORTANT)]
    if differing:
        got = f"others (of the batch and here): {'; '.join(differing)}"
        hint = "images would not be equal; use another -o FOLDER, or the environment of the batch"
        raise invalid(InputError, plan.folder.parent, "the versions, device and weights of the batch", got, hint)


def read_environment(plan: Plan) -> Record | None:
    """Return the environment in a plan; None if there is none yet."""
    path = plan.folder / ENVIRONMENT
    try:
        record: Record = json.loads(path.read_bytes())
        check_entry(record, {name: SCHEMA[name] for name in ("versions", "checkpoint", "machine")}, "", str(path))
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise invalid(InputError, path, "the environment of a batch, as JSON", first_line(error)) from error


def environment_of(plan: Plan, pipe: Any) -> Record:
    """Return what the images of a pipeline have in common in their records."""
    settings, rows = plan.settings, plan.settings.batch
    blank = Image.new("RGB", *BLANK)
    record = pipe.records([blank] * rows, seed=[0] * rows, **settings.call_options())[0]
    if record["reasons"]:
        raise invalid(InputError, "pipeline", "one whose images can be made again", "; ".join(record["reasons"]))
    shared: Record = json.loads(json.dumps({name: value for name, value in record.items() if name not in OF_ROW}))
    if settings.format == "parquet":
        shared["versions"]["pyarrow"] = import_pyarrow("format").__version__
    return shared
