"""The operations that models are built of, each by the fastest kernel that applies.

This is the one file of models/ that imports kernels/. Everything here equals PyTorch's own up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, invalid
from ..kernels import autotune, cpu_kernels, polyphase
from ..kernels.cpu_kernels import linear
from ..kernels.packed_weights import PackedWeights, write_count
from ..kernels.sdpa_backends import CANDIDATES, Attend, SDPAKernel, sdpa
from .stock import GLOBAL_HOOKS, are_stock, is_unmodified

__all__ = ["Attend", "PackedWeights", "SDPAKernel", "linear", "sdpa", "write_count"]


@dataclass(frozen=True)
class Execution:
    """How operations run in the current context.

    `packed`: the packed weights of the run that is under way. `autotune`: time all candidates of an operation.
    `static_shapes`: compile or record for these shapes alone, with the candidate that autotuning found for them.
    """

    packed: PackedWeights | None = None
    autotune: bool = False
    static_shapes: bool = False


PLAIN = Execution()
_execution: ContextVar[Execution] = ContextVar("imvar_execution", default=PLAIN)


@contextmanager
def executing(**changes: Any) -> Iterator[None]:
    """Change fields of the current `Execution` inside the `with` block, in this thread or task."""
    token = _execution.set(replace(_execution.get(), **changes))
    try:
        yield
    finally:
        _execution.reset(token)


@contextmanager
def packing(model: nn.Module, calls: int = 1) -> Iterator[None]:
    """Keep packed weights for `calls` forward passes of `model` in the `with` block.

    Nothing is kept inside another run of several passes, with gradients, or for a model with hooks or third-party
    layers.
    """
    outer = packed_weights()
    kept = outer is not None and (outer.calls > 1 or calls == 1)
    if kept or torch.compiler.is_compiling() or torch.is_grad_enabled() or not is_unmodified(model):
        yield
    else:
        with executing(packed=PackedWeights(calls)):
            yield


def packed_weights() -> PackedWeights | None:
    """Return the packed weights of the run that is under way, if any."""
    return None if torch.compiler.is_compiling() else _execution.get().packed


def static_shapes() -> bool:
    """Return whether the call is for static shapes (runtime/compiled.py makes this a constant of the graph)."""
    return _execution.get().static_shapes


# what torch.compiler.assume_constant_result sets, without importing dynamo, which takes a second
static_shapes._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fastest(name: str, candidates: tuple[Callable[..., Tensor], ...], *inputs: Tensor) -> Tensor:
    """Call the first candidate; for static shapes, the one that autotuning found the fastest."""
    if not torch.compiler.is_compiling() and _execution.get().autotune:
        autotune.tune(name, candidates, inputs)
    index = autotune.winner(autotune.key_of(name, inputs)) if static_shapes() else 0
    return candidates[index](*inputs)


LINEAR, CONV2D, CONV_FORWARD, GROUP_NORM = (
    nn.Linear.forward,
    nn.Conv2d.forward,
    nn.Conv2d._conv_forward,
    nn.GroupNorm.forward,
)  # another function in their place, for every layer of the process, is called


class Linear(nn.Linear):
    """`nn.Linear` with faster CPU kernels."""

    def forward(self, input: Tensor) -> Tensor:
        if nn.Linear.forward is not LINEAR:
            return super().forward(input)
        return linear(input, self.weight, self.bias)

    def _set_qconfig(self, qconfig: Any) -> None:
        hint = "set layer.__class__ = torch.nn.Linear for each first"
        raise invalid(InputError, "quantization", "layers of class torch.nn.Linear", "imvar's subclass", hint)

    qconfig = property(None, _set_qconfig, doc="Set by torch.ao.quantization, which skips subclasses without a word.")


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with faster CPU kernels."""

    def forward(self, input: Tensor) -> Tensor:
        if nn.Conv2d.forward is not CONV2D:
            return super().forward(input)
        return cpu_kernels.conv2d(self, input, packed_weights())


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that keeps its precision in the channels_last memory format."""

    def forward(self, input: Tensor) -> Tensor:
        if nn.GroupNorm.forward is not GROUP_NORM:
            return super().forward(input)
        return cpu_kernels.group_norm(self, input, packed_weights())


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot product attention: q (b, h, n, d), k and v (b, h, m, d) to (b, h, n, d)."""
    return fastest("attention", CANDIDATES, q, k, v)


def norm_act(norm: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """Normalise, then activate; a plain SiLU in place where neither autograd nor a hook needs the normalised x."""
    h = norm(x)
    in_place = type(norm) is GroupNorm and type(act) is nn.SiLU and not torch.is_grad_enabled()
    hooks = *GLOBAL_HOOKS, norm._forward_hooks, act._forward_pre_hooks, act._forward_hooks
    return act(h) if not in_place or any(hooks) else F.silu(h, inplace=True)


def add_conv(conv: nn.Module, x: Tensor, compute_residual: Callable[[], Tensor]) -> Tensor:
    """Compute compute_residual() + conv(x). The residual is computed last, for memory, unless one kernel adds both."""
    replaced = nn.Conv2d.forward is not CONV2D or nn.Conv2d._conv_forward is not CONV_FORWARD
    if replaced or type(conv) is not Conv2d or not cpu_kernels.add_conv_pays(conv, x, packed_weights()):
        out = conv(x)
        return compute_residual() + out
    residual = compute_residual()
    fits = residual.dtype == x.dtype and residual.shape == (len(x), conv.out_channels, *x.shape[2:])
    return cpu_kernels.add_conv(conv, x, residual) if fits else residual + conv(x)


def gelu_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Compute x * GELU(gate), in the memory of GELU(gate) where autograd does not need it."""
    gate = F.gelu(gate)
    return x * gate if torch.is_grad_enabled() else gate.mul_(x)


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation x * sigmoid(1.702 x) of GELU (arXiv:1606.08415), which OpenAI's CLIP was trained with."""
    if torch.is_grad_enabled():
        return x * torch.sigmoid(1.702 * x)
    return (1.702 * x).sigmoid_().mul_(x)  # one temporary tensor rather than three


def upsample_conv(conv: nn.Module, x: Tensor) -> Tensor:
    """Upsample x (b, c, h, w) by 2, nearest neighbour, then convolve."""

    def plain(x: Tensor) -> Tensor:
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    replaced = nn.Conv2d.forward is not CONV2D or nn.Conv2d._conv_forward is not CONV_FORWARD
    if not isinstance(conv, nn.Conv2d) or replaced or not are_stock(conv) or not polyphase.is_same_3x3(conv):
        return plain(x)
    if cpu_kernels.fused_upsample_pays(conv, x, packed := packed_weights()):
        return cpu_kernels.upsample_conv(conv, x, packed)
    weight, bias = conv.weight, conv.bias

    def by_phases(x: Tensor) -> Tensor:
        out = x.new_empty(len(x), len(weight), 2 * x.shape[2], 2 * x.shape[3])
        return polyphase.upsample_conv_by_phases(x, polyphase.phase_kernels(weight), bias, out)

    return fastest("upsample_conv", (plain, by_phases), x) if type(conv) is Conv2d else plain(x)
