"""Compiled execution: `torch.compile`, and on CUDA one recorded graph per set of shapes, replayed without Python.

With the backend `CUDA_GRAPHS` the graph is one of the eager kernels.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ..errors import InputError, first_line, invalid, short_repr, warn_user
from ..kernels import autotune
from ..models.attention import attention_layers
from ..models.ops import executing, write_count
from ..models.stock import IMVAR, top_package
from ..oom import is_out_of_memory
from .quantized import quantized_layers
from .torch_flags import flags_of

MODE_WITHOUT_GRAPHS = {  # CUDA graphs are recorded here
    "max-autotune": "max-autotune-no-cudagraphs",
    "reduce-overhead": "default",
}
CUDA_GRAPHS = "cudagraphs"
MAX_GRAPHS = 8

torch.compiler.assume_constant_result(autotune.winner)  # a constant of the graph; importing dynamo takes a second


class Compiler:
    """`compiler(function, model)` runs `function(model, *inputs)` compiled by `torch.compile`, without graph breaks.

    `inputs` are tensors, also nested in lists and tuples; outputs are the caller's own. The function is compiled for
    each set of shapes, dtypes and devices at first use, and stays compiled for any values. On CUDA a call is then
    recorded as a CUDA graph, once per set, and again after weights, or settings of the model or of PyTorch, were
    replaced. Where a function cannot be compiled or recorded, a warning says why, once, and it runs eagerly. A custom
    merge, which may count its calls, is recorded only if it has an attribute `precomputable = True`. Threads may share
    a compiler. `options` are those of `torch.compile`. With `backend="cudagraphs"`, which takes no others, eager calls
    are recorded, and where nothing can be recorded, as on a CPU, they stay eager.
    """

    def __init__(self, **options: Any):
        self.options = checked_options(options)
        self.is_eager = self.options.get("backend") == CUDA_GRAPHS
        self.compiled: dict[Any, Callable[..., Any]] = {}
        self.graphs: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
        self.pool: Any = None  # the memory of the graphs, shared, since one is replayed at a time
        self.done: Any = None  # the event after the last replay
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Compiler, **self.options), ()  # a copy starts empty

    def __call__(self, function: Callable[..., Any], model: nn.Module) -> Callable[..., Any]:
        with self.lock:
            for layer in quantized_layers(model):
                if not layer.compilable:
                    return partial(function, model)
                layer.quantize_weight()  # which compiled code does not
            if not any(p.is_cuda for p in model.parameters()) or not is_recordable(model):
                return partial(function, model) if self.is_eager else partial(self.run, function, model)
            if not all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.ndim == 4):
                model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # for tensor cores
                torch.cuda.current_stream().synchronize()  # for threads with streams of their own
            return partial(self.replay, function, model, graph_key(model))

    def run(self, function: Callable[..., Any], model: nn.Module, *inputs: Any) -> Any:
        """Call the compiled function, or the eager one with the kernels that autotuning found."""
        if self.is_eager:
            with executing(static_shapes=True, packed=None):  # packed weights are freed before the next replay
                return function(model, *inputs)
        if function not in self.compiled:
            self.compiled[function] = torch.compile(function, **self.options)
        try:
            # PyTorch takes more than a few shapes for a mistake; here each is an image size that the user chose
            many_shapes = torch._dynamo.config.patch(recompile_limit=64)  # type: ignore[attr-defined]
            with many_shapes, executing(static_shapes=self.options["dynamic"] is False):
                return self.compiled[function](model, *inputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise  # caused by these inputs, not by the compiler
            if self.compiled[function] is not function:
                warn_fallback("compile", error)
            self.compiled[function] = function
            return function(model, *inputs)

    def replay(self, function: Callable[..., Any], model: nn.Module, model_key: Any, *inputs: Any) -> Any:
        """Call the compiled function as a CUDA graph."""
        tensors, spec = tree_flatten(inputs)
        key = function, model, model_key, spec, tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        with self.lock, torch.cuda.device(tensors[0].device):
            if key not in self.graphs:
                if self.done:
                    self.done.synchronize()  # graphs that are dropped now are no longer running
                for old in [old for old in self.graphs if old[0] is function and old[1] is not model]:
                    del self.graphs[old]  # of a model that this one replaced
                if not self.graphs:
                    self.pool = None  # PyTorch records into no pool whose graphs are all gone
                self.graphs[key] = self.record(function, model, tensors, spec)
                while len(self.graphs) > MAX_GRAPHS:
                    self.graphs.popitem(last=False)
            self.graphs.move_to_end(key)
            return self.graphs[key](*tensors)

    def record(self, function: Callable[..., Any], model: nn.Module, tensors: Any, spec: Any) -> Callable[..., Any]:
        def call(*tensors: Tensor) -> Any:
            return self.run(function, model, *tree_unflatten(tensors, spec))

        try:
            with executing(autotune=True):  # so that the fastest candidates are known before they are compiled in
                function(model, *tree_unflatten(tensors, spec))
            self.pool, self.done = self.pool or torch.cuda.graph_pool_handle(), self.done or torch.cuda.Event()
            return CUDAGraphCall(call, tensors, self.pool, self.done)
        except Exception as error:
            self.pool = None  # nor into one in which a recording failed
            if is_out_of_memory(error):
                raise
            warn_fallback("record", error)
            return call


class CUDAGraphCall:
    """A call as a CUDA graph: inputs are copied in, all kernels launched at once, and outputs copied out.

    Graphs that share the memory `pool` also share `done`, the event after the last of them.
    """

    def __init__(self, call: Callable[..., Any], inputs: list[Tensor], pool: Any, done: Any):
        with torch.inference_mode(False), torch.no_grad():  # outside of inference mode, inputs can be written to later
            self.inputs = [t.clone() for t in inputs]
        self.copied: list[Any] = [(lambda: None, None) for _ in inputs]
        for _ in range(3):  # kernels are compiled, chosen and loaded before the recording
            call(*self.inputs)  # on this stream, since cuBLAS keeps a workspace for each, of 32 MiB on Hopper
        self.graph, self.done = torch.cuda.CUDAGraph(), done
        with (
            torch.cuda.stream(torch.cuda.current_stream()),  # restored also after a recording that fails
            torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"),
        ):
            self.outputs = call(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        torch.cuda.current_stream().wait_event(self.done)  # of another thread, on its own stream
        self.copy_inputs(inputs)
        self.graph.replay()
        outputs = tree_map_only(Tensor, Tensor.clone, self.outputs)
        self.done.record()
        return outputs

    def copy_inputs(self, inputs: tuple[Tensor, ...]) -> None:
        """Copy the tensors in, except those of the last call: what is precomputed stays from step to step."""
        changed = [
            i for i, (last, t) in enumerate(zip(self.copied, inputs, strict=True)) if not is_same_tensor(t, *last)
        ]
        if changed:
            targets, sources = [self.inputs[i] for i in changed], [inputs[i] for i in changed]
            torch._foreach_copy_(targets, sources)  # type: ignore[attr-defined]
        self.copied = [(weakref.ref(t), None if t.is_inference() else write_count(t)) for t in inputs]


def checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a compiler with their defaults. Raises `InputError`."""
    if options.get("backend") == CUDA_GRAPHS:  # PyTorch has one of that name, which torch.compile traces for
        if len(options) > 1:
            others = {name: value for name, value in options.items() if name != "backend"}
            raise invalid(InputError, "compile", f"no other option with backend={CUDA_GRAPHS!r}", short_repr(others))
        return options
    try:
        mode = MODE_WITHOUT_GRAPHS.get(options.get("mode", ""), options.get("mode"))
        checked: dict[str, Any] = {"fullgraph": True, "dynamic": False} | options | {"mode": mode}
        torch.compile(warn_fallback, **checked)  # validates the options; compiles only when it is called
    except Exception as error:
        got = f"{short_repr(options)}: {first_line(error)}"
        raise invalid(InputError, "compile", "options of torch.compile", got) from error
    return checked


def is_same_tensor(tensor: Tensor, last: Callable[[], Tensor | None], count: int | None) -> bool:
    """Return whether this is the tensor of the last call, unwritten since; for inference tensors that is unknown."""
    return last() is tensor and count is not None and count == write_count(tensor)


def warn_fallback(verb: str, error: Exception) -> None:
    reason = shorten(f"{type(error).__name__}: {error}", 200)
    warn_user(f"compile: cannot {verb} this model on this machine, so it runs without: {reason}")


def is_recordable(model: nn.Module) -> bool:
    """Return whether a replay is the same as a call, which a custom merge that counts its calls prevents."""
    merge = getattr(model, "merge", None)
    return merge is None or top_package(merge) == IMVAR or getattr(merge, "precomputable", False)


def graph_key(model: nn.Module) -> tuple[Any, ...]:
    """Return what a graph was recorded for: where the weights are, and the settings of the model and of PyTorch."""
    quantized = (layer.quantized[0].data_ptr() for layer in quantized_layers(model))
    kernels = [(layer.attend, layer.backend, layer.slice_size) for layer in attention_layers(model)]
    merges = getattr(model, "merge", None), getattr(model, "freeu", None)
    weights = list(model.parameters())
    flags = flags_of(weights[0].device).items()
    return *merges, *(p.data_ptr() for p in weights), *quantized, *kernels, *flags
