"""The state of a run between two steps, in one file."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from filelock import FileLock, Timeout
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
            try:
                atomic_write(folder / NAME, lambda temporary: torch.save(state, temporary))
            except RuntimeError as error:  # as PyTorch says that the disk is full
                got = f"{shutil.disk_usage(folder).free:,} bytes free ({first_line(error)})"
                raise SystemExit(f"{folder / NAME}: expected room for the state, got {got}") from error

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


def lock_folder(folder: Path) -> FileLock:
    """Create a folder, and return the lock of the run in it, held until this process ends.

    Raises `SystemExit` if there is another run in it, or if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise SystemExit(f"{folder}: expected a folder without a run in progress, got one with; wait for it") from None
    except OSError as error:
        got = error.strerror or first_line(error)
        raise SystemExit(f"{folder}: expected a folder that can be written, got {got}") from error
    return lock


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
