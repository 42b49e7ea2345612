"""Candidates for the layers of the published UNet and decoder, in turn, each with its error beside float64.

A layer's inputs are of its shape in a guided step, or a decoded image, of 512 x 512 pixels. On CUDA a candidate is
recorded as a CUDA graph of `CALLS` calls, so that launches are hardly in its time; its inputs may stay in the cache.
Candidates that are compiled, or of CUDA alone, are left out elsewhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmark.machine import setting
from benchmark.tables import markdown_table, reported
from benchmark.timing import rms_error, time_call
from imvar.errors import first_line
from imvar.kernels.sdpa_backends import SDPAKernel, sdpa

HEADER = ("layer", "shape", "candidate", "microseconds", "first / this", "rms error")
CALLS = 50
GROUPS, EPS = 32, 1e-5
WIDTHS = 64, 128, 256, 512  # that heads are padded to
BACKENDS = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
HEADS = (2, 8, 4096, 40), (2, 8, 1024, 80), (2, 8, 256, 160), (2, 8, 64, 160), (1, 1, 4096, 512)
FEATURES = (2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16), (1, 512, 128, 128), (1, 128, 512, 512)
TINY_HEADS, TINY_FEATURES = ((1, 2, 16, 40),), ((1, 64, 8, 8),)

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Candidate:
    """A function of a layer's inputs, which are given to it in `memory_format`."""

    name: str
    function: Function
    memory_format: torch.memory_format = torch.contiguous_format

    def run(self, inputs: list[Tensor]) -> Callable[[], Tensor]:
        """Return the call of the function."""
        return partial(
            self.function, *(t.contiguous(memory_format=self.memory_format) if t.ndim == 4 else t for t in inputs)
        )


def compiled(function: Function) -> Function:
    torch.compiler.reset()  # or the shapes of all layers would count as recompilations of one function
    return torch.compile(function, fullgraph=True, dynamic=False)


# Attention


def flex(q: Tensor, k: Tensor, v: Tensor) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v)


def padded(width: int, kernel: Function, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call an attention kernel with heads padded by zeros to `width`."""
    d = q.shape[-1]
    q = q * (width / d) ** 0.5  # for the kernel's scale, which is that of the width
    return kernel(*(F.pad(t, (0, width - d)) for t in (q, k, v)))[..., :d]


def attention_candidates(d: int, on_cuda: bool) -> Iterator[Candidate]:
    """Yield the kernels for heads of width d, then each with padded heads."""
    kernels: dict[str, Function] = {"default SDPA": sdpa}
    if on_cuda:
        kernels |= {backend.name: SDPAKernel(backend) for backend in BACKENDS}
        kernels["flex_attention, compiled"] = compiled(flex)
    yield from (Candidate(name, kernel) for name, kernel in kernels.items())
    width = next(width for width in WIDTHS if width >= d)
    if width > d:
        yield from (Candidate(f"{name}, padded to {width}", partial(padded, width, k)) for name, k in kernels.items())


# Norms and convolutions


def norm_act(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


def conv(x: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(x, kernel, padding=1)


def norm_act_conv(x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor) -> Tensor:
    return conv(norm_act(x, weight, bias), kernel)


def with_cudnn_benchmark(function: Function, *inputs: Tensor) -> Tensor:
    with setting(torch.backends.cudnn, "benchmark", True):
        return function(*inputs)


def feature_candidates(function: Function, on_cuda: bool) -> Iterator[Candidate]:
    """Yield the function in both memory formats: eager, for convolutions with cudnn.benchmark, for norms compiled."""
    ways = {"eager": function}
    if on_cuda:
        if function is not norm_act:
            ways["eager, cudnn.benchmark"] = partial(with_cudnn_benchmark, function)
        if function is not conv:
            ways["compiled"] = compiled(function)
    for way, call in ways.items():
        yield from (Candidate(f"{way}, {name}", call, memory_format) for name, memory_format in FORMATS.items())


# The table


def layers(args: argparse.Namespace) -> Iterator[tuple[str, list[Tensor], list[Candidate]]]:
    """Yield a layer's name, its inputs in float64 and its candidates, the first of which computes all of them."""
    on_cuda = args.device.type == "cuda"
    generator = torch.Generator(args.device).manual_seed(0)
    randn = partial(torch.randn, generator=generator, device=args.device, dtype=torch.float64)
    for shape in TINY_HEADS if args.tiny else HEADS:
        yield "attention", [randn(shape) for _ in range(3)], list(attention_candidates(shape[-1], on_cuda))
    for shape in TINY_FEATURES if args.tiny else FEATURES:
        c = shape[1]
        x, norm, kernel = randn(shape), [1 + 0.1 * randn(c), 0.1 * randn(c)], randn(c, c, 3, 3) / (9 * c) ** 0.5
        yield "group norm, SiLU", [x, *norm], list(feature_candidates(norm_act, on_cuda))
        yield "3x3 convolution", [x, kernel], list(feature_candidates(conv, on_cuda))
        yield "group norm, SiLU, 3x3 convolution", [x, *norm, kernel], list(feature_candidates(norm_act_conv, on_cuda))


def seconds_of_call(run: Callable[[], Tensor], args: argparse.Namespace) -> float:
    """Return the median time of a call, on CUDA with a share of the launch of a graph of `CALLS` calls."""
    if args.device.type != "cuda":
        return median(time_call(run, args.device) for _ in range(args.rounds))
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    with torch.cuda.stream(stream), torch.cuda.graph(graph):  # a recording that fails does not restore the stream
        for _ in range(CALLS):
            run()
    graph.replay()
    return median(time_call(graph.replay, args.device) for _ in range(args.rounds)) / CALLS


def cells_of(candidate: Candidate, inputs: list[Tensor], expected: Tensor, args: argparse.Namespace) -> tuple[Any, ...]:
    """Return the seconds of a candidate, None if it fails, and its error beside `expected`, or why it fails."""
    run = candidate.run(inputs)
    try:
        for _ in range(3):
            out = run()
        return seconds_of_call(run, args), f"{rms_error(out, expected):.1e}"
    except Exception as error:  # a candidate that is not for this layer is a result
        return None, f"{type(error).__name__}: {first_line(error)}"


@torch.no_grad()
def kernels_table(dtype: torch.dtype, args: argparse.Namespace) -> str:
    rows = []
    for layer, exact, candidates in layers(args):
        inputs, first = [t.to(dtype) for t in exact], None
        expected = candidates[0].function(*(t.double() for t in inputs))
        for candidate in candidates:
            seconds, error = cells_of(candidate, inputs, expected, args)
            first = first or seconds
            times = ("", "") if seconds is None or first is None else (f"{1e6 * seconds:.1f}", f"{first / seconds:.2f}")
            shape = " x ".join(map(str, exact[0].shape))
            rows.append(reported((layer, shape, candidate.name, *times, error)))
    return markdown_table(HEADER, rows)
