"""What a pipeline is beside its job: parts by name, moved, set and reported on together."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from PIL.Image import Image
from torch import nn
from torch.nn.attention import SDPBackend

from ..checks import as_device, check_int, check_type, parse_to_args
from ..context import holding
from ..errors import InputError, InputTypeError, short_repr
from ..image import numpy_to_pil
from ..models.attention import Attend, memory_efficient
from ..models.stock import is_unmodified
from ..oom import explain_out_of_memory
from ..runtime.precompute import Runner
from .components import device_of
from .offload import Offload
from .pretrained import PretrainedPipeline

if TYPE_CHECKING:
    from ..runtime.compiled import Compiler

_active_calls: ContextVar[tuple[tuple[Any, Any], ...]] = ContextVar("imvar_stepping", default=())
"""The pipelines that are being called here, innermost last, each with that call's own scheduler."""


class PipelineBase(PretrainedPipeline):
    """The base of a pipeline: holds its parts as attributes and treats them as one."""

    vae: Any
    unet: Any

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._settings: dict[str, Any] = {}
        self._bar_options: dict[str, Any] = {}
        self._offload: Offload | None = None
        self._compiler: Compiler | None = None

    def register_modules(self, **parts: Any) -> None:
        """Keep these parts under their names; None for one that is left out."""
        for name, part in parts.items():
            setattr(self, name, part)
            if name not in self._parts:
                self._parts = [*self._parts, name]  # a list and settings of its own, also for a shallow copy

    def register_to_config(self, **settings: Any) -> None:
        """Keep settings of the pipeline itself, which are saved with it."""
        check_type("requires_safety_checker", settings.get("requires_safety_checker"), bool)
        self._settings = self._settings | settings

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name, so that `Pipe(**other.components)` shares them."""
        return {name: getattr(self, name) for name in self._parts}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The parts that have weights."""
        return {name: part for name, part in self.components.items() if isinstance(part, nn.Module)}

    # The scheduler is the one part that a call changes, so every call has its own.

    @property
    def scheduler(self) -> Any:
        """The scheduler; within a call, the copy that this call steps."""
        return next((own for pipe, own in reversed(_active_calls.get()) if pipe is self), self._scheduler)

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def own_scheduler(self) -> AbstractContextManager[None]:
        """For the time of a call, in this thread alone, a copy of the scheduler for the call to step.

        The copy is a shallow one. A scheduler of which a method was replaced is stepped itself, as whatever
        replaced it may refer to it.
        """
        scheduler = self._scheduler
        replaced = any(callable(getattr(type(scheduler), name, None)) for name in getattr(scheduler, "__dict__", ()))
        try:
            own = scheduler if replaced else copy.copy(scheduler)
        except Exception:  # one that cannot be copied, such as some that hand all on to another
            own = scheduler
        return holding(_active_calls, (*_active_calls.get(), (self, own)))

    # Where and what the weights are

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return device_of(self.components, torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are."""
        return next((p.dtype for module in self.modules.values() for p in module.parameters()), torch.float32)

    @property
    def _execution_device(self) -> torch.device:
        return self._offload.device if self._offload else self.device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast all parts, as `nn.Module.to` does, and return this pipeline.

        A device, a dtype of floats, both, or a tensor to take both from; `non_blocking` and `memory_format`. Raises
        `InputError` for what is none of these, before anything moves, and `OutOfMemoryError`.
        """
        wanted = parse_to_args(*args, **kwargs)
        if "device" in wanted:
            self.remove_all_hooks()
        with explain_out_of_memory("use torch.float16, or enable_model_cpu_offload() instead of to()"):
            for module in self.modules.values():
                module.to(**wanted)
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep the parts in main memory and bring each to the accelerator only while it works.

        `device`: "cuda" unless named; `gpu_id` numbers it. Threads that call this pipeline then take turns.
        Raises `InputError` where there is no accelerator.
        """
        if device is None:
            if not torch.accelerator.is_available():
                raise InputError("enable_model_cpu_offload: there is no accelerator here to offload from")
            device = torch.accelerator.current_accelerator()
        if gpu_id is not None:
            own, _, number = str(device).partition(":")
            if number not in ("", str(check_int("gpu_id", gpu_id, low=0))):
                raise InputError(f"gpu_id={gpu_id} and device={device} name different devices", key="gpu_id")
            device = f"{own}:{gpu_id}"
        target = as_device("device", device) or torch.device("cpu")
        if target.type == "meta":
            raise InputError("device='meta': weights would be lost there; an accelerator would do", key="device")
        self.remove_all_hooks()
        self._offload = Offload(target, self.modules)

    def remove_all_hooks(self) -> None:
        """End the offloading, if any."""
        if self._offload:
            self._offload.remove()
            self._offload = None

    def maybe_free_model_hooks(self) -> None:
        """Under offloading, send every part back to main memory."""
        if self._offload:
            self._offload.rest()

    # Speed

    def compile(self, **options: Any) -> None:
        """Let the UNet and the autoencoder's decoder be compiled, with the `options` of `torch.compile`.

        On CUDA each of their calls is then replayed as a graph, so that no step waits for Python. That happens in the
        first call of this pipeline, and again for every new size, batch or dtype: from a minute up to many with
        `mode="max-autotune"`. Seeds, pictures, guidance, samplers and numbers of steps need nothing new, and neither
        does what changes weights in place; other weights are recorded anew. A model that cannot be compiled runs as
        it is, with a warning. Parts with hooks or layers of others, and parts that are offloaded, run as they are.
        """
        from ..runtime.compiled import Compiler  # with what only it needs

        self._compiler = Compiler(**options)

    def enable_fp8(self) -> None:
        """Approximate: let the UNet's linear layers multiply in eight bits, row by row scaled (arXiv:2209.05433).

        For NVIDIA's Ada, Hopper and later; slower elsewhere. Raises `InputError` on a GPU that cannot.
        """
        from ..runtime import fp8

        fp8.enable(self.unet)

    def disable_fp8(self) -> None:
        from ..runtime import fp8

        fp8.disable(self.unet)

    @property
    def runner(self) -> Runner:
        """How functions of the models are run: see `compile`."""
        compiler = self._compiler
        if compiler is None or self._offload:
            return partial
        return lambda function, model: (compiler if is_unmodified(model) else partial)(function, model)

    # Settings that belong to the models

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Let the UNet attend to a few heads at a time: "auto" half, "max" one, a number, or None for all."""
        self.unet.set_attention_slice(slice_size)

    def disable_attention_slicing(self) -> None:
        self.unet.set_attention_slice(None)

    def enable_xformers_memory_efficient_attention(self, attention_op: SDPBackend | Attend | None = None) -> None:
        """Let UNet and autoencoder attend with PyTorch's memory-efficient backend, or with `attention_op`."""
        kernel = memory_efficient(attention_op)
        for model in (self.unet, self.vae):
            model.enable_xformers_memory_efficient_attention(kernel)

    def disable_xformers_memory_efficient_attention(self) -> None:
        for model in (self.unet, self.vae):
            model.disable_xformers_memory_efficient_attention()

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Let the UNet merge its skips as FreeU does (arXiv:2309.11497)."""
        self.unet.enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2)

    def disable_freeu(self) -> None:
        self.unet.disable_freeu()

    def enable_vae_slicing(self) -> None:
        """Decode a batch one picture at a time."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode large pictures in overlapping tiles, which changes them a little."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        self.vae.disable_tiling()

    # Reporting

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A tqdm bar over `iterable`, or one of `total` ticks to be updated by hand."""
        from huggingface_hub.utils import tqdm

        if iterable is None and total is None:
            raise InputError("progress_bar: an iterable or a total would do")
        if iterable is not None and not isinstance(iterable, Iterable):
            raise InputTypeError(f"iterable={short_repr(iterable)}: something to go through would do", key="iterable")
        return tqdm(iterable, total=total, **self._bar_options)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options for tqdm, such as `disable=True`. Raises `InputTypeError` for what is none, or cannot be one."""
        from huggingface_hub.utils import tqdm

        class Trial(tqdm.__mro__[1]):  # type: ignore[misc]  # which looks at its options even where all bars are off
            _lock, monitor_interval = tqdm.get_lock(), 0

        try:
            if not hasattr(options.get("file") or sys.stderr, "write"):
                raise TypeError("file has no write")
            bool(options.get("disable"))
            seen = {name: value for name, value in options.items() if name not in ("name", "write_bytes")}
            with Trial(total=2, **(seen | {"file": io.StringIO(), "disable": False})) as trial:
                trial.update()
        except Exception as error:  # of a name that it does not know, tqdm's own is a KeyError
            raise InputTypeError(
                f"set_progress_bar_config({short_repr(options)}): options of tqdm would do, such as disable=True ({error})"
            ) from error
        self._bar_options = options

    def __getstate__(self) -> dict[str, Any]:
        """All but the file that the bar is drawn in, which is of this process."""
        bar = {name: value for name, value in self._bar_options.items() if name != "file"}
        return vars(self) | {"_bar_options": bar}

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image]:
        """(b, h, w, 3) with values in [0, 1] to pictures."""
        return numpy_to_pil(images)

    def __repr__(self) -> str:
        parts = "\n".join(f"  {name}: {type(part).__name__}" for name, part in self.components.items())
        return f"{type(self).__name__}\n{parts}"
