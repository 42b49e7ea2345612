"""The settings of a batch: every option that changes a byte of its files, fixed in the plan."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..checks import TYPE_NAMES, as_path, check_int
from ..choices import CHECKPOINT, DTYPES, EMOJI, EMOJI_STEPS, FLAG_NOTES, SCHEDULERS, STEPS
from ..errors import InputError, InputTypeError, invalid, short_repr
from ..limits import MAX_SEED
from ..loading import HUB_ID, is_emoji
from ..pipeline.arguments import check_option, check_scale
from ..records.files import FORMATS

MAXIMA = {"n": 10**6, "batch": 4096, "shard": 10**6, "steps": 10**6, "threads": 1024, "height": 2**16, "width": 2**16}
CHOICES = {
    "scheduler": tuple(SCHEDULERS),
    "dtype": ("auto", *DTYPES),
    "seeds": ("own", "same"),
    "on_flagged": tuple(FLAG_NOTES),
    "format": ("files", "tar", "parquet"),
    "save": tuple(FORMATS),
}
OPTIONAL = {"revision", "scheduler", "threads", "steps", "height", "width"}
"""Settings that may be None: as the checkpoint has it, or for `threads` as many as PyTorch takes at first."""


@dataclass(frozen=True)
class Settings:
    """The variations that a batch makes of each input, and how.

    `n`: variations of each input; `seed` and `seeds`: "own" derives the seed of each variation from `seed`, the id of
    the input and the number of the variation, "same" gives variation k of every input the seed `seed` + k. `batch`:
    rows of every call of the pipeline; `shard`: inputs that are made together; `threads`: of PyTorch on the CPU. The
    other fields are the options of `imvar vary`.
    """

    checkpoint: str = CHECKPOINT
    revision: str | None = None
    scheduler: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    n: int = 4
    seed: int = 0
    seeds: str = "own"
    steps: int | None = None
    guidance: float = 3.0
    height: int | None = None
    width: int | None = None
    on_flagged: str = "black"
    batch: int = 4
    shard: int = 64
    format: str = "files"
    save: str = "png"
    metadata: bool = True

    def __post_init__(self) -> None:
        values: dict[str, Any] = {"guidance": check_scale("guidance", self.guidance)}
        for name, high in MAXIMA.items():
            value = getattr(self, name)
            values[name] = None if value is None and name in OPTIONAL else check_int(name, value, high=high)
        values["seed"] = check_int("seed", self.seed, low=0, high=MAX_SEED - values["n"] + 1)
        for name in ("height", "width"):
            if values[name] is not None and values[name] % 8:
                raise invalid(InputError, name, "a multiple of 8", str(values[name]))
        for name, kind in {"checkpoint": str, "device": str, "revision": str, "metadata": bool}.items():
            if not isinstance(getattr(self, name), kind) and not (name in OPTIONAL and getattr(self, name) is None):
                raise invalid(InputTypeError, name, TYPE_NAMES[kind], short_repr(getattr(self, name)))
        for name, choices in CHOICES.items():
            if not (name in OPTIONAL and getattr(self, name) is None):
                check_option(name, getattr(self, name), choices)
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the class is frozen

    @classmethod
    def resolved(cls, **options: Any) -> Settings:
        """Return settings whose paths and defaults do not depend on the folder or the checkpoint any more."""
        if unknown := options.keys() - {field.name for field in fields(cls)}:
            name = min(unknown)
            raise invalid(InputTypeError, name, "an option of a batch", f"{name}={short_repr(options[name])}")
        options["checkpoint"] = checkpoint = str(as_path("checkpoint", options.get("checkpoint", CHECKPOINT)))
        if is_emoji(checkpoint):
            options["steps"] = EMOJI_STEPS if options.get("steps") is None else options["steps"]
            options["dtype"] = "float32" if options.get("dtype", "auto") == "auto" else options["dtype"]
            options["threads"] = 1 if options.get("threads") is None else options["threads"]
        elif os.path.exists(checkpoint):
            options["checkpoint"] = os.path.abspath(checkpoint)  # workers may have another working folder
        elif not HUB_ID.fullmatch(checkpoint):
            raise invalid(InputError, "checkpoint", f"a file, a folder, a hub id or {EMOJI}", short_repr(checkpoint))
        options["steps"] = STEPS if options.get("steps") is None else options["steps"]
        return cls(**options)

    def json_text(self) -> str:
        """Return the settings as one line of JSON, equal for equal settings."""
        return json.dumps(vars(self), sort_keys=True, separators=(",", ":"))

    def seed_of(self, item: str, k: int) -> int:
        """Return the seed of variation k of the input with this id."""
        if self.seeds == "same":
            return self.seed + k
        text = f"{self.seed}\n{k}\n{item}".encode(errors="surrogatepass")
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1  # 63 bits

    def call_options(self) -> dict[str, Any]:
        """Return the arguments of the pipeline that all calls share."""
        return {
            "height": self.height,
            "width": self.width,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "on_flagged": self.on_flagged,
        }


def setting_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return how two sets of settings differ, such as "guidance: 3.0 and 7.0"."""
    names = [*a, *(name for name in b if name not in a)]
    return [f"{name}: {a.get(name)} and {b.get(name)}" for name in names if a.get(name) != b.get(name)]
