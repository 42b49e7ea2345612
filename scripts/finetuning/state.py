"""The state of a run between two steps, in one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from finetuning.trainable import MovingAverage, Parameters, copy_values, gather
from imvar.atomic.file import atomic_write
from imvar.errors import first_line

NAME = "state.pt"
OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


@dataclass
class Run:
    """A training between two steps."""

    unet: Any
    parameters: Parameters
    optimizer: Optimizer
    average: MovingAverage | None
    recipe: dict[str, Any]
    step: int = 0

    def save(self, folder: Path, is_main: bool) -> None:
        """Write the state to a folder, in place of an earlier one. All ranks call it, and the main one writes."""
        state = {
            "recipe": self.recipe,
            "step": self.step,
            "parameters": gather(self.parameters, is_main),
            "average": gather(self.average.means if self.average else {}, is_main),
            "optimizer": get_optimizer_state_dict(self.unet, self.optimizer, options=OPTIONS),
        }
        if is_main:
            for unfinished in folder.glob(f".{NAME}.*.tmp"):  # of a run that was killed while it saved
                unfinished.unlink(missing_ok=True)
            atomic_write(folder / NAME, lambda temporary: torch.save(state, temporary))

    def resume(self, folder: Path) -> None:
        """Continue from the state in a folder, if there is one. Raises `SystemExit` if it has another recipe."""
        if not (folder / NAME).exists():
            return
        state = read_state(folder)
        for name, value in self.recipe.items():
            if (had := state["recipe"].get(name)) != value:
                raise SystemExit(f"{folder / NAME}: expected {name} {value}, got {had}; pass another --out")
        copy_values(self.parameters, state["parameters"])
        if self.average is not None:
            copy_values(self.average.means, state["average"])
        set_optimizer_state_dict(self.unet, self.optimizer, state["optimizer"], options=OPTIONS)
        self.step = state["step"]


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state in a folder, on the CPU. Raises `SystemExit` if it is missing or damaged."""
    path = folder / NAME
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: state[name] for name in ("recipe", "step", "parameters", "average", "optimizer")}
    except FileNotFoundError:
        raise SystemExit(f"{path}: expected the state of a run, got no file") from None
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, EOFError, UnpicklingError) as error:
        hint = "delete it to start from the first step"
        raise SystemExit(f"{path}: expected the state of a run, got {first_line(error)}; {hint}") from error
