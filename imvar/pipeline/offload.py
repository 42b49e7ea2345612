"""Parts that stay in main memory and visit the accelerator one at a time."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn


class Offload:
    """Moves a part to `device` when it is called, and the part that was there before back to the CPU.

    A part counts as called when it, or a module right below it, runs: an autoencoder is used through
    `decode`, which calls its decoder. `with offload:` is one call of the pipeline: threads take turns, and
    everything is back on the CPU at its end.
    """

    def __init__(self, device: torch.device, parts: dict[str, nn.Module]):
        self.device, self.turn = device, threading.RLock()
        self.visiting: nn.Module | None = None
        self.hooks: list[Any] = []
        for part in parts.values():
            part.to("cpu")
            for module in (part, *part.children()):
                self.hooks.append(module.register_forward_pre_hook(OnloadHook(self, part)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, turn=threading.RLock())

    def __enter__(self) -> None:
        self.turn.acquire()

    def __exit__(self, *_: object) -> None:
        try:
            self.rest()
        finally:
            try:
                self.rest()  # again, where that was stopped
            finally:
                self.turn.release()

    def visit(self, part: nn.Module) -> None:
        if part is not self.visiting:
            self.rest()
            self.visiting = part  # before it moves, so that one that was stopped half way is sent back
            part.to(self.device)

    def rest(self) -> None:
        """Everything back to the CPU."""
        if self.visiting is not None:
            self.visiting.to("cpu")
            self.visiting = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def remove(self) -> None:
        """Back to ordinary parts, on the CPU."""
        self.rest()
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()


class OnloadHook:
    """The hook of a module of `part`; a class, so that it can be copied with the part and pickled."""

    def __init__(self, offload: Offload, part: nn.Module):
        self.offload, self.part = offload, part

    def __call__(self, *_: Any) -> None:
        self.offload.visit(self.part)
