"""The record of each image of a call: everything that its pixels depend on (see `imvar/records/record.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from ..records.machine import UNKNOWN_MACHINE, machine_of, versions
from ..records.record import FORMAT, Record
from ..records.values import as_json
from ..records.weights import Checkpoint, checkpoint_of
from ..weights.origin import dtypes_of
from .arguments import Call
from .inputs import Inputs
from .switches import models_of, reasons_of_pipeline, scheduler_of, switches_of

SETTINGS = (
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "eta",
    "guidance_interval",
    "cache_interval",
    "guidance_rescale",
    "strength",
    "paste",
    "on_flagged",
    "conditions",
)
"""Arguments of a call that a record has under `settings`."""


class CallRecords:
    """The records of the images of one call. `finished()` adds the digest of the weights, which may take seconds."""

    def __init__(self, records: list[Record], checkpoint: Checkpoint):
        self.records, self.checkpoint = records, checkpoint

    def finished(self) -> list[Record]:
        """Return the records with the digest of the weights."""
        self.checkpoint.add_digests()
        for record in self.records:
            add_reasons(record, self.checkpoint.reasons)
        return self.records

    def add_reason(self, reason: str) -> None:
        """Note in every record why its image cannot be made again."""
        for record in self.records:
            add_reasons(record, [reason])

    def add_flags(self, flags: Sequence[bool] | None) -> None:
        """Note the safety checker's decision about each image."""
        for i, record in enumerate(self.records):
            record["flagged"] = None if flags is None else bool(flags[i])


def add_reasons(record: Record, reasons: Sequence[str]) -> None:
    record["reasons"] = list(dict.fromkeys([*record["reasons"], *reasons]))
    record["exact"] = not record["reasons"]


def call_records(pipe: Any, call: Call) -> CallRecords:
    """Return the records of a call whose arguments are checked and whose guidance is planned.

    What third-party components and arguments do not let be read is left out, with a reason; nothing is raised.
    """
    reasons: list[str] = []

    def guarded(name: str, function: Callable[..., Any], *args: Any, default: Any = None) -> Any:
        try:
            return function(*args)
        except Exception as error:  # third-party objects raise anything
            reasons.append(f"{name}: could not be recorded ({type(error).__name__})")
            return default

    models = guarded("models", models_of, pipe, default={})
    checkpoint = guarded("checkpoint", checkpoint_of, models, default=Checkpoint())
    dtypes = {name: dtypes_of(layers) for name, layers in models.items()}
    shared = {
        "format": FORMAT,
        "versions": versions(),
        "checkpoint": checkpoint.entry,
        "settings": guarded("settings", settings_of, call, reasons, default={}),
        "scheduler": guarded("scheduler", scheduler_of, pipe, default={"class": "unknown", "config": {}}),
        "pipeline": guarded("pipeline", switches_of, pipe, models, default={}),
        "machine": guarded("machine", machine_of, call.device, dtypes, default=UNKNOWN_MACHINE),
    }
    reasons += checkpoint.reasons
    guarded("call", lambda: reasons.extend(reasons_of_call(call)))
    guarded("pipeline", lambda: reasons.extend(reasons_of_pipeline(pipe, models)))
    rows, inputs = call.shape[0], Inputs(pipe, call)
    by_row = [guarded("inputs", lambda row=row: list(inputs.of_row(row)), default=[]) for row in range(rows)]
    reasons += inputs.digests.reasons
    records = [
        {
            **shared,
            "seed": None if call.seeds is None else call.seeds[row],
            "inputs": by_row[row],
            "call": {"rows": rows, "row": row, "images": call.images, "image": row // call.num_images_per_prompt},
            "exact": True,
            "reasons": [],
        }
        for row in range(rows)
    ]
    for record in records:
        add_reasons(record, reasons)
    return CallRecords(records, checkpoint)


# Arguments


def settings_of(call: Call, reasons: list[str]) -> dict[str, Any]:
    """Return the arguments of a call that a JSON value represents."""
    given = {name: call.given[name] if name == "conditions" else getattr(call, name) for name in SETTINGS}
    settings = {name: as_json(value) for name, value in given.items()}
    if call.given["conditions"]:
        reasons.append("conditions: of a custom pipeline")
    return settings


def reasons_of_call(call: Call) -> Iterator[str]:
    """Yield why an argument keeps the images from being made again."""
    if call.given["generator"] is not None:
        yield "generator: one of the caller's; pass seed instead"
    elif call.seeds is None:
        yield "seed: none was given"
    if call.latents is not None:
        yield "latents: given as a tensor"
    for name in ("callback", "callback_on_step_end"):
        if getattr(call, name) is not None:
            yield f"{name}: a function"
    if isinstance(call.init_image, Tensor) and len(call.init_image) > 1:
        yield "init_image: several, encoded together"
