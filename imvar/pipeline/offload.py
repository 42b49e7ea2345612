"""Model offloading: components stay in main memory and are moved to the accelerator one at a time."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import torch
from torch import nn


class Offload:
    """Move a component to `device` when it is called, and the previous one back to the CPU.

    A component counts as called when it or one of its children runs: an autoencoder is used through `decode`, which
    calls its decoder. `with offload:` is one call of the pipeline: threads wait for each other, and at its end
    everything is back on the CPU.
    """

    def __init__(self, device: torch.device, components: dict[str, nn.Module]):
        self.device, self.lock = device, threading.RLock()
        self.onloaded: nn.Module | None = None
        self.hooks: list[Any] = []
        for component in components.values():
            component.to("cpu")
            for module in (component, *component.children()):
                # a partial of a function, so that it can be copied and pickled with the module
                self.hooks.append(module.register_forward_pre_hook(partial(Offload.onload, self, component)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock())

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        try:
            self.offload_all()
        finally:
            try:
                self.offload_all()  # again, in case the first was interrupted
            finally:
                self.lock.release()

    def onload(self, component: nn.Module, *_: Any) -> None:
        """Move this component to the device, after the previous one left it."""
        if component is not self.onloaded:
            self.offload_all()
            self.onloaded = component  # before it moves, so that an interrupted move is undone
            component.to(self.device)

    def offload_all(self) -> None:
        """Move the component on the device back to the CPU."""
        if self.onloaded is not None:
            self.onloaded.to("cpu")
            self.onloaded = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def remove(self) -> None:
        """Remove the hooks; the components stay on the CPU."""
        self.offload_all()
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
