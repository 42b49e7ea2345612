"""Where the time of a guided step and of a decoded picture goes, and how far it is from the floor."""

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
from imvar.kernels import cpu_kernels as cpu
from imvar.models import attention, layers

HEADER = ("kind", "seconds", "share", "GFLOP", "GFLOP/s", "floor, seconds")


class Account:
    """Seconds and multiplications by kind; what a kind calls of another counts for the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, float] = defaultdict(float)
        self.inner = [0.0]

    def watching(
        self,
        kind: str,
        function: Callable[..., Any],
        flops: Callable[..., float] | None = None,
    ) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            self.inner.append(0.0)
            answer = function(*args, **options)
            took = time.perf_counter() - begun
            self.seconds[kind] += took - self.inner.pop()
            self.inner[-1] += took
            if flops:
                self.flops[kind] += flops(answer, *args)
            return answer

        return watched


def of_linear(answer: Tensor, x: Tensor, *_: Any) -> float:
    return 2.0 * answer.numel() * x.shape[-1]


def of_convolution(answer: Tensor, conv: nn.Conv2d, *_: Any) -> float:
    return 2.0 * answer.numel() * conv.weight[0].numel()


def of_kernel(answer: Tensor, x: Tensor, kernel: Tensor, *_: Any) -> float:
    return 2.0 * answer.numel() * math.prod(kernel.shape[1:])


def of_attention(answer: Tensor, name: str, ways: Any, q: Tensor, k: Tensor, *_: Any) -> float:
    return 4.0 * answer.numel() * k.shape[-2]


@contextmanager
def watched(account: Account) -> Iterator[None]:
    """In here, every kernel of a run reports."""
    by_matrices = account.watching("3x3 convolution, by fewer products", cpu.winograd_conv)
    product = account.watching("3x3 convolution, by fewer products", cpu.onednn_linear, of_linear)
    plain = account.watching("linear layers", cpu.linear, of_linear)

    def convolve(conv: nn.Conv2d, x: Tensor, real: Callable[..., Tensor] = cpu.conv2d) -> Tensor:
        seen: list[Any] = []

        def fewer(way: Any, *args: Any) -> Tensor:
            seen.append(way)
            return by_matrices(way, *args)

        with mock.patch.object(cpu, "by_matrices", fewer), mock.patch.object(cpu, "onednn_linear", product):
            return account.watching("convolution", real, lambda *args: 0.0 if seen else of_convolution(*args))(conv, x)

    def enlarge(conv: nn.Conv2d, x: Tensor, real: Callable[..., Tensor] = cpu.upsample_conv) -> Tensor:
        inside = account.watching(kind := "enlarging, by fewer products", cpu.onednn_linear, of_linear)
        phase = account.watching(kind, cpu.onednn_convolution, of_kernel)
        with mock.patch.object(cpu, "onednn_linear", inside), mock.patch.object(cpu, "onednn_convolution", phase):
            return account.watching(kind, real)(conv, x)

    def linear(*args: Any, real: Any = cpu.onednn_linear) -> Tensor:
        with mock.patch.object(cpu, "onednn_linear", real):
            return plain(*args)

    with ExitStack() as stack:
        for module, name, watching in (
            (cpu, "convolve", convolve),
            (cpu, "linear", linear),
            (attention, "linear", linear),
            (attention, "quickest", account.watching("attention", attention.quickest, of_attention)),
            (cpu, "enlarge", enlarge),
            (cpu, "group_norm", account.watching("norms, SiLU", cpu.group_norm)),
            (layers.F, "layer_norm", account.watching("norms, SiLU", F.layer_norm)),
            (layers.F, "silu", account.watching("norms, SiLU", F.silu)),
            (layers.F, "gelu", account.watching("GELU", F.gelu)),
        ):
            stack.enter_context(mock.patch.object(module, name, watching))
        yield


def peak(dtype: torch.dtype) -> float:
    """FLOP a second of the quickest large product or convolution that is here: what the floor is reckoned with."""
    a, x, w = torch.randn(4096, 4096), torch.randn(2, 640, 64, 64), torch.randn(640, 640, 3, 3)
    a, x, w = (t.to(dtype) for t in (a, x, w))
    x = x.to(memory_format=torch.channels_last)
    best = 0.0
    for run, flops in ((lambda: a @ a, 2 * 4096**3), (lambda: F.conv2d(x, w, padding=1), 2 * 8192 * 640 * 640 * 9)):
        run()
        for _ in range(3):
            begun = time.perf_counter()
            run()
            best = max(best, flops / (time.perf_counter() - begun))
    return best


@torch.no_grad()
def profile(libraries: Libraries) -> str:
    """Tables, of the median round of each job."""
    fastest, parts = peak(libraries.dtype), []
    for case in (guided_step(libraries, libraries.args.batch, libraries.size), next(iter(vae(libraries)))):
        for _ in range(2):  # weights are put in order, memory is taken
            case.imvar()
        accounts = []
        for _ in range(libraries.args.rounds):
            accounts.append((Account(), time.perf_counter()))
            account = accounts[-1][0]
            with watched(account):
                account.watching("the rest", case.imvar)()
        account = sorted((a for a, _ in accounts), key=lambda a: sum(a.seconds.values()))[len(accounts) // 2]
        parts.append(table(case.name, account, fastest))
    return "\n\n".join(parts)


def table(name: str, account: Account, fastest: float) -> str:
    whole = sum(account.seconds.values())
    rows = [(f"{name}: kind", *HEADER[1:]), ("---",) * len(HEADER)]
    for kind, seconds in sorted(account.seconds.items(), key=lambda item: -item[1]):
        rows.append(
            (kind, f"{seconds:.3f}", f"{100 * seconds / whole:.0f} %", *figures(account.flops[kind], seconds, fastest))
        )
    rows.append(("all", f"{whole:.3f}", "", *figures(sum(account.flops.values()), whole, fastest)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def figures(flops: float, seconds: float, fastest: float) -> tuple[str, str, str]:
    if not flops:
        return "", "", ""
    return f"{flops / 1e9:.0f}", f"{flops / seconds / 1e9:.0f}", f"{flops / fastest:.3f}"
