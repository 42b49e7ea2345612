"""The settings of a batch: every option that changes a byte of its files, fixed in the plan."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..checks import check_float, check_int, check_type
from ..choices import CHECKPOINT, DTYPES, EMOJI_STEPS, FLAG_NOTES, SCHEDULERS, STEPS
from ..errors import InputError, invalid, short_repr
from ..limits import MAX_SEED
from ..loading import is_emoji
from ..records.files import FORMATS

LAYOUTS = ("files", "tar")
SEEDS = ("own", "same")
MAX_BATCH = 4096


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
        check_type("checkpoint", self.checkpoint, str, Path)
        integers = {"n": 10**6, "batch": MAX_BATCH, "shard": 10**6, "steps": 10**6, "threads": 1024}
        for name, high in integers.items():
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), low=1, high=high)
        check_int("seed", self.seed, low=0, high=MAX_SEED - self.n + 1)
        check_float("guidance", self.guidance, high=math.inf)
        choices = {
            "scheduler": (None, *SCHEDULERS),
            "dtype": ("auto", *DTYPES),
            "seeds": SEEDS,
            "on_flagged": tuple(FLAG_NOTES),
            "format": LAYOUTS,
            "save": tuple(FORMATS),
        }
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                expected = f"one of {', '.join(map(str, accepted))}"
                raise invalid(InputError, name, expected, short_repr(getattr(self, name)))

    @classmethod
    def resolved(cls, **options: Any) -> Settings:
        """Return settings whose paths and defaults do not depend on the folder or the checkpoint any more."""
        if unknown := options.keys() - {field.name for field in fields(cls)}:
            raise invalid(InputError, min(unknown), "an option of a batch", short_repr(options[min(unknown)]))
        settings = cls(**options)
        emoji = is_emoji(str(settings.checkpoint))
        if not emoji and os.path.exists(settings.checkpoint):  # workers may have another working folder
            options["checkpoint"] = os.path.abspath(settings.checkpoint)
        options["checkpoint"] = str(options.get("checkpoint", settings.checkpoint))
        options["steps"] = settings.steps or (EMOJI_STEPS if emoji else STEPS)
        if emoji and settings.dtype == "auto":
            options["dtype"] = "float32"
        if settings.threads is None:
            options["threads"] = 1 if emoji else int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        return cls(**options)

    def json_text(self) -> str:
        """Return the settings as one line of JSON, equal for equal settings."""
        return json.dumps(vars(self), sort_keys=True, separators=(",", ":"))

    def seed_of(self, item: str, k: int) -> int:
        """Return the seed of variation k of the input with this id."""
        if self.seeds == "same":
            return self.seed + k
        text = f"{self.seed}\n{k}\n".encode() + os.fsencode(item)
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
