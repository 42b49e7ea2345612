"""The state of a run between two steps, in one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from finetuning.trainable import Parameters, copy_values, whole
from imvar.atomic.file import atomic_write

NAME = "state.pt"
OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


@dataclass
class Run:
    """A training between two steps."""

    unet: Any
    parameters: Parameters
    optimizer: Optimizer
    average: AveragedModel | None
    recipe: dict[str, Any]
    step: int = 0

    def save(self, folder: Path, is_main: bool) -> None:
        """Write the state to a folder, in place of an earlier one. All ranks call it, and the main one writes."""
        means = () if self.average is None else self.average.module.parameters()
        state = {
            "recipe": self.recipe,
            "step": self.step,
            "parameters": {name: whole(parameter) for name, parameter in self.parameters.items()},
            "average": dict(zip(self.parameters, map(whole, means), strict=False)),
            "optimizer": get_optimizer_state_dict(self.unet, self.optimizer, options=OPTIONS),
        }
        if is_main:
            atomic_write(folder / NAME, lambda temporary: torch.save(state, temporary))

    def resume(self, folder: Path) -> None:
        """Continue from the state in a folder, if there is one. Raises `SystemExit` if it has another recipe."""
        if not (folder / NAME).exists():
            return
        state = read_state(folder)
        for name, value in self.recipe.items():
            if (had := state["recipe"].get(name)) != value:
                raise SystemExit(f"{folder / NAME}: expected {name} {value}, got {had}; pass another --out")
        copy_values(self.parameters, state["parameters"].values())
        if self.average is not None:
            copy_values(dict(enumerate(self.average.module.parameters())), state["average"].values())  # type: ignore[arg-type]
            self.average.n_averaged.fill_(state["step"])
        set_optimizer_state_dict(self.unet, self.optimizer, state["optimizer"], options=OPTIONS)
        self.step = state["step"]


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state in a folder, on the CPU."""
    return torch.load(folder / NAME, map_location="cpu", weights_only=True, mmap=True)
