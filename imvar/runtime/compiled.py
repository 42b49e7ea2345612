"""Quicker ways to run a model's functions: compiled, and on CUDA recorded once and replayed without Python."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ..context import holding
from ..errors import InputError, short_repr
from ..kernels import autotune as trial
from ..models.attention import attention_layers
from ..oom import is_out_of_memory
from .fp8 import Fp8Linear

MODE_WITHOUT_GRAPHS = {
    "max-autotune": "max-autotune-no-cudagraphs",
    "reduce-overhead": "default",
}  # graphs are made here
MAX_GRAPHS = 8  # recordings

_sized: ContextVar[bool] = ContextVar("imvar_sized", default=False)


def sized() -> bool:
    return _sized.get()


trial.is_static_shape = sized
for constant in trial.winner, sized:  # in what is compiled; marked here, as whatever marks it takes a second to import
    torch.compiler.assume_constant_result(constant)


class Compiler:
    """`compiler(function, model)` runs `function(model, *inputs)` as `torch.compile` made it, without a graph break.

    `inputs` are tensors, also in lists and tuples; what comes back is the caller's own. It is compiled for each set
    of shapes, dtypes and devices, when they are first seen, and stays so for any values. On CUDA a call is then
    recorded as a graph, once for each set, and again after weights or settings of the model were replaced. Where a
    function cannot be compiled or recorded, a warning says why, once, and it runs as it is. Threads may share one.
    `options` are those of `torch.compile`.
    """

    def __init__(self, **options: Any):
        self.options: dict[str, Any] = {"fullgraph": True, "dynamic": False} | options
        self.options["mode"] = MODE_WITHOUT_GRAPHS.get(options.get("mode", ""), options.get("mode"))
        try:
            torch.compile(
                warn_fallback, **self.options
            )  # which looks at the options, and at the function when it is called
        except Exception as error:
            raise InputError(f"compile({short_repr(options)}): options of torch.compile would do: {error}") from error
        self.compiled: dict[Any, Callable[..., Any]] = {}
        self.recordings: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
        self.shared: tuple[Any, Any] | None = None  # by the recordings, of which only one is replayed at a time
        self.turn = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Compiler, **self.options), ()  # a copy begins anew

    def __call__(self, function: Callable[..., Any], model: nn.Module) -> Callable[..., Any]:
        with self.turn:
            for layer in model.modules():
                if isinstance(layer, Fp8Linear):
                    layer.round_weight()  # which compiled code does not
            if not any(p.is_cuda for p in model.parameters()):
                return partial(self.run, function, model)
            if not all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.ndim == 4):
                model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # tensor cores' order
                torch.cuda.current_stream().synchronize()  # for threads with streams of their own
            return partial(self.replay, function, model, graph_key(model))

    def run(self, function: Callable[..., Any], model: nn.Module, *inputs: Any) -> Any:
        """The compiled call."""
        if function not in self.compiled:
            self.compiled[function] = torch.compile(function, **self.options)
        try:
            with allow_many_shapes(), holding(_sized, self.options["dynamic"] is False):
                return self.compiled[function](model, *inputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise  # of these inputs, and no fault of the compiler
            if self.compiled[function] is not function:
                warn_fallback("compile", error)
            self.compiled[function] = function
            return function(model, *inputs)

    def replay(self, function: Callable[..., Any], model: nn.Module, known: Any, *inputs: Any) -> Any:
        """The compiled call as recorded, on CUDA."""
        tensors, form = tree_flatten(inputs)
        key = function, model, known, form, tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        with self.turn, torch.cuda.device(tensors[0].device):
            if key not in self.recordings:
                if self.shared:
                    self.shared[1].synchronize()  # what makes room for this one is out of use
                for old in [old for old in self.recordings if old[0] is function and old[1] is not model]:
                    del self.recordings[old]  # of a model whose place this one took
                self.recordings[key] = self.record(
                    lambda *tensors: self.run(function, model, *tree_unflatten(tensors, form)),
                    partial(function, model),
                    tensors,
                    form,
                )
                while len(self.recordings) > MAX_GRAPHS:
                    self.recordings.popitem(last=False)
            self.recordings.move_to_end(key)
            return self.recordings[key](*tensors)

    def record(
        self,
        call: Callable[..., Any],
        eager: Callable[..., Any],
        tensors: list[Tensor],
        form: Any,
    ) -> Callable[..., Any]:
        try:
            with trial.autotuning():  # so that the quickest ways for these sizes are known before they are compiled
                eager(*tree_unflatten(tensors, form))
            self.shared = self.shared or (torch.cuda.graph_pool_handle(), torch.cuda.Event())
            return CUDAGraphCall(call, tensors, *self.shared)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            warn_fallback("record", error)
            return call


class CUDAGraphCall:
    """A call as a CUDA graph: its tensors copied in, every kernel started at once, the answer copied out.

    Recordings that share `pool`, their memory, share `done` as well: when the last of them was through.
    """

    def __init__(self, call: Callable[..., Any], inputs: list[Tensor], pool: Any, done: Any):
        self.inputs = [t.clone() for t in inputs]
        self.given: list[Any] = [(lambda: None, None) for _ in inputs]
        warm, here = torch.cuda.Stream(), torch.cuda.current_stream()
        warm.wait_stream(here)
        with torch.cuda.stream(warm):
            for _ in range(3):  # kernels are compiled, chosen and loaded before the recording
                call(*self.inputs)
        here.wait_stream(warm)
        self.graph, self.done = torch.cuda.CUDAGraph(), done
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.answer = call(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        torch.cuda.current_stream().wait_event(self.done)  # by another thread, on a stream of its own
        self.take(inputs)
        self.graph.replay()
        answer = tree_map_only(Tensor, Tensor.clone, self.answer)
        self.done.record()
        return answer

    def take(self, inputs: tuple[Tensor, ...]) -> None:
        """Copy the tensors in, but for those that were given before: what a run prepared stays from step to step."""
        new = [i for i, (given, t) in enumerate(zip(self.given, inputs, strict=True)) if not is_unchanged(t, *given)]
        if new:
            torch._foreach_copy_([self.inputs[i] for i in new], [inputs[i] for i in new])  # type: ignore[attr-defined]
        self.given = [(weakref.ref(t), None if t.is_inference() else t._version) for t in inputs]


def is_unchanged(tensor: Tensor, given: Callable[[], Tensor | None], version: int | None) -> bool:
    """Whether this very tensor was given before, and was not written to since; inference mode tells nothing of that."""
    return given() is tensor and version is not None and version == tensor._version


def warn_fallback(doing: str, error: Exception) -> None:
    reason = shorten(f"{type(error).__name__}: {error}", 200)
    warnings.warn(f"compile: cannot {doing} this model here, so it runs without: {reason}", stacklevel=2)


def graph_key(model: nn.Module) -> tuple[Any, ...]:
    """What a recording holds for: where the weights lie, and the settings that change what is computed."""
    eights = (layer.weight8.data_ptr() for layer in model.modules() if isinstance(layer, Fp8Linear))
    kernels = [(layer.attend, layer.override, layer.slice_size) for layer in attention_layers(model)]
    return getattr(model, "merge", None), *(p.data_ptr() for p in model.parameters()), *eights, *kernels


@contextmanager
def allow_many_shapes() -> Iterator[None]:
    """PyTorch takes more than a few shapes for a mistake; here they are sizes that somebody asked for."""
    with torch._dynamo.config.patch(recompile_limit=64):  # type: ignore[attr-defined]
        yield
