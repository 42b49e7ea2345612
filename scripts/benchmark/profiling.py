"""Profile of a guided step and of a decoded image on a CPU: time per kind of layer, against the floor."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmark.cases import Libraries, guided_step, vae
from benchmark.tables import markdown_table
from imvar.kernels import cpu_kernels
from imvar.models import attention, ops

HEADER = ("kind", "seconds", "share", "GFLOP", "GFLOP/s", "floor, seconds")
WINOGRAD, UPSAMPLING = "3x3 convolution, Winograd", "upsampling convolution"


class Profile:
    """Seconds and FLOP per kind; a nested call of another kind counts only for that kind."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, float] = defaultdict(float)
        self.nested = [0.0]  # seconds of nested calls, per level

    def record(
        self, kind: str, function: Callable[..., Any], flops: Callable[..., float] | None = None
    ) -> Callable[..., Any]:
        """Return `function` with its time, and `flops(output, *args)`, added to `kind`."""

        def recorded(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            self.nested.append(0.0)
            out = function(*args, **options)
            duration = time.perf_counter() - start
            self.seconds[kind] += duration - self.nested.pop()
            self.nested[-1] += duration
            if flops:
                self.flops[kind] += flops(out, *args)
            return out

        return recorded


def linear_flops(out: Tensor, x: Tensor, *_: Any) -> float:
    return 2.0 * out.numel() * x.shape[-1]


def conv_flops(out: Tensor, conv: nn.Conv2d, *_: Any) -> float:
    return 2.0 * out.numel() * conv.weight[0].numel()


def kernel_flops(out: Tensor, x: Tensor, kernel: Tensor, *_: Any) -> float:
    return 2.0 * out.numel() * math.prod(kernel.shape[1:])


def attention_flops(out: Tensor, q: Tensor, k: Tensor, *_: Any) -> float:
    return 4.0 * out.numel() * k.shape[-2]


@contextmanager
def recording(profile: Profile) -> Iterator[None]:
    """Record every kernel in `profile` inside the `with` block."""
    winograd = profile.record(WINOGRAD, cpu_kernels.call_winograd)
    winograd_matmul = profile.record(WINOGRAD, cpu_kernels.onednn_linear, linear_flops)

    def conv2d(conv: nn.Conv2d, *args: Any, function: Callable[..., Tensor] = cpu_kernels.conv2d) -> Tensor:
        used_winograd = False

        def call_winograd(*args: Any) -> Tensor:
            nonlocal used_winograd
            used_winograd = True
            with mock.patch.object(cpu_kernels, "onednn_linear", winograd_matmul):
                return winograd(*args)

        def flops(*args: Any) -> float:
            return 0.0 if used_winograd else conv_flops(*args)

        with mock.patch.object(cpu_kernels, "call_winograd", call_winograd):
            return profile.record("convolution", function, flops)(conv, *args)

    def upsample_conv(*args: Any, function: Callable[..., Tensor] = cpu_kernels.upsample_conv) -> Tensor:
        matmul = profile.record(UPSAMPLING, cpu_kernels.onednn_linear, linear_flops)
        conv = profile.record(UPSAMPLING, F.conv2d, kernel_flops)
        with (
            mock.patch.object(cpu_kernels, "onednn_linear", matmul),
            mock.patch.object(F, "conv2d", conv),
        ):
            return profile.record(UPSAMPLING, function)(*args)

    with ExitStack() as stack:
        for module, name, function in (
            (cpu_kernels, "conv2d", conv2d),
            (cpu_kernels, "upsample_conv", upsample_conv),
            (ops, "linear", profile.record("linear layers", cpu_kernels.linear, linear_flops)),
            (attention, "linear", profile.record("linear layers", cpu_kernels.linear, linear_flops)),
            (cpu_kernels, "group_norm", profile.record("norms, SiLU", cpu_kernels.group_norm)),
            (attention, "attention", profile.record("attention", attention.attention, attention_flops)),
            (F, "layer_norm", profile.record("norms, SiLU", F.layer_norm)),
            (F, "silu", profile.record("norms, SiLU", F.silu)),
            (F, "gelu", profile.record("GELU", F.gelu)),
        ):
            stack.enter_context(mock.patch.object(module, name, function))
        yield


def peak_flops(dtype: torch.dtype, n: int = 640) -> float:
    """Return the FLOP/s of a large matrix product or a large convolution, the faster of them: it sets the floor."""
    side = 4096 * n // 640
    a, x, w = torch.randn(side, side), torch.randn(2, n, 64, 64), torch.randn(n, n, 3, 3)
    a, x, w = (t.to(dtype) for t in (a, x, w))
    x = x.to(memory_format=torch.channels_last)
    best = 0.0
    for run, flops in ((lambda: a @ a, 2 * side**3), (lambda: F.conv2d(x, w, padding=1), 2 * 8192 * n * n * 9)):
        run()
        for _ in range(3):
            start = time.perf_counter()
            run()
            best = max(best, flops / (time.perf_counter() - start))
    return best


@torch.no_grad()
def profile_table(libraries: Libraries) -> str:
    """Return a table for each job, of its median round."""
    peak, tables = peak_flops(libraries.dtype, 64 if libraries.args.tiny else 640), []
    for case in (guided_step(libraries, libraries.args.batch, libraries.size), next(iter(vae(libraries)))):
        for _ in range(2):  # packs weights and allocates memory
            case.imvar()
        profiles = []
        for _ in range(libraries.args.rounds):
            profiles.append(profile := Profile())
            with recording(profile):
                profile.record("the rest", case.imvar)()
        median = sorted(profiles, key=lambda profile: sum(profile.seconds.values()))[len(profiles) // 2]
        tables.append(table(case.name, median, peak))
    return "\n\n".join(tables)


def table(name: str, profile: Profile, peak: float) -> str:
    total = sum(profile.seconds.values())
    rows = []
    for kind, seconds in sorted(profile.seconds.items(), key=lambda item: -item[1]):
        share = f"{100 * seconds / total:.0f} %"
        rows.append((kind, f"{seconds:.3f}", share, *flops_cells(profile.flops[kind], seconds, peak)))
    rows.append(("all", f"{total:.3f}", "", *flops_cells(sum(profile.flops.values()), total, peak)))
    return markdown_table((f"{name}: kind", *HEADER[1:]), rows)


def flops_cells(flops: float, seconds: float, peak: float) -> tuple[str, str, str]:
    if not flops:
        return "", "", ""
    return f"{flops / 1e9:.0f}", f"{flops / seconds / 1e9:.0f}", f"{flops / peak:.3f}"
