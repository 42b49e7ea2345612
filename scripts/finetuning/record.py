"""The record of a run, `training.json`: its settings when it starts, its outcome when it is exported."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetuning.reports import read_log
from finetuning.settings import Settings
from imvar.atomic.file import write_text
from imvar.records.machine import versions
from imvar.records.weights import checkpoint_of
from imvar.weights.origin import layers_of

NAME = "training.json"
PATHS = {"images", "out", "checkpoint", "validate"}  # settings


def start_record(settings: Settings, images: int) -> None:
    """Write the settings of a run, without paths, as exports have them too, and the number of its images."""
    values = {name: value for name, value in vars(settings).items() if name not in PATHS}
    libraries = {name: version(name) for name in ("accelerate", "peft")}
    write_record(settings.out, {"settings": values, "images": images, "versions": versions() | libraries})


def finish_record(settings: Settings, state: dict[str, Any], pipe: Any, weights: str) -> dict[str, Any]:
    """Add the outcome of a run to its record, and return it.

    `pipe`: the checkpoint, with the weights of its files. `weights`: those that are exported.
    """
    path = settings.out / NAME
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    base = checkpoint_of({name: layers_of(model) for name, model in pipe.modules.items()})
    base.add_digests()
    rows = [row for row in read_log(settings.out) if row["step"] <= state["step"]]
    losses = {name: row[name] for row in rows for name in ("loss", "validation loss") if name in row}
    record |= {
        "checkpoint": base.entry,
        "stage": settings.stage,
        "step": state["step"],
        "step size": state["recipe"]["step size"],
        "exported weights": weights,
        **losses,
    }
    write_record(settings.out, record)
    return record


def write_record(out: Path, record: dict[str, Any]) -> None:
    write_text(out / NAME, f"{json.dumps(record, indent=2)}\n")
