"""Attention: kernels, which are functions of q, k, v, and the layers that ask them.

A layer's `attend` is its kernel, and any callable will do; one that is a module has its weights
saved with the model. Attention slicing and a memory-efficient backend are laid over it per model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from ..checks import check_int
from ..errors import InputError, InputTypeError, short_repr
from ..kernels.autotune import autotuned
from ..kernels.cpu_kernels import linear
from .layers import CallableSlots, GroupNorm, Linear
from .stock import Precomputed, repeat_to_batch
from .validation import check_attention_output

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q: b h n d; k, v: b h m d; answer: b h n d, softmax(q k^T / sqrt(d)) v (arXiv:1706.03762, equation 1)."""

sdpa: Attend = F.scaled_dot_product_attention
"""PyTorch's, by the backend that it picks; where it is compiled for CUDA, by the one that was found the quickest."""

aten = torch.ops.aten


def sliced(size: int, attend: Attend = sdpa) -> Attend:
    """The same answer, `size` heads of one picture at a time: less memory at once, more time."""
    if not callable(attend):
        raise InputTypeError(f"attend={short_repr(attend)}: a function of q, k and v would do", key="attend")
    return partial(sliced_attention, check_int("size", size), attend)


def sliced_attention(size: int, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups = zip(*(rearrange(t, "b h n d -> (b h) 1 n d").split(size) for t in (q, k, v)), strict=True)
    return torch.cat([attend(*group) for group in groups]).view_as(q)


Operator = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Any, ...]]

# Private operators, but the only way to choose a backend for one call and not for the process
_OPERATORS: dict[SDPBackend, Operator] = {
    SDPBackend.EFFICIENT_ATTENTION: lambda q, k, v, training, scale: aten._scaled_dot_product_efficient_attention(
        q, k, v, None, training, scale=scale
    ),
    SDPBackend.CUDNN_ATTENTION: lambda q, k, v, training, scale: aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, training, scale=scale
    ),
    SDPBackend.FLASH_ATTENTION: lambda q, k, v, training, scale: aten._scaled_dot_product_flash_attention(
        q, k, v, scale=scale
    ),
    SDPBackend.MATH: lambda q, k, v, training, scale: aten._scaled_dot_product_attention_math(q, k, v, scale=scale),
}
_HALF = torch.float16, torch.bfloat16
# What they are made for: some answer others with noise
_DTYPES = {
    SDPBackend.EFFICIENT_ATTENTION: (*_HALF, torch.float32),
    SDPBackend.CUDNN_ATTENTION: _HALF,
    SDPBackend.FLASH_ATTENTION: _HALF,
    SDPBackend.MATH: (*_HALF, torch.float32, torch.float64),
}
ALIGNED = 8  # what the width of a head has to be a multiple of, for each of them


@dataclass(frozen=True)
class SDPAKernel:
    """A kernel: one of PyTorch's SDPA backends, for these calls alone, as no process-wide flag is touched.

    On CUDA the backend's own operator is called, with heads of another width than a multiple of 8 padded with zeros;
    elsewhere the default SDPA answers.
    """

    name: SDPBackend = SDPBackend.EFFICIENT_ATTENTION
    operator: Operator = field(init=False, repr=False, compare=False)
    dtypes: tuple[torch.dtype, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, SDPBackend) or self.name not in _OPERATORS:
            names = ", ".join(backend.name for backend in _OPERATORS)
            raise InputError(
                f"attention_op={short_repr(self.name)}: an SDPBackend out of {names} would do, or a callable"
            )
        vars(self).update(operator=_OPERATORS[self.name], dtypes=_DTYPES[self.name])  # as compilers cannot look it up

    def __reduce__(self) -> tuple[Any, ...]:  # as the backends themselves cannot be pickled
        return sdpa_kernel, (self.name.name,)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.is_cuda:
            return sdpa(q, k, v)
        if q.dtype not in self.dtypes:
            raise InputTypeError(
                f"attention_op={self.name.name}: queries of {q.dtype} came; "
                f"{' or '.join(map(str, self.dtypes))} would do",
                key="attention_op",
            )
        training = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        width, lacking = q.shape[-1], -q.shape[-1] % ALIGNED
        if lacking:
            q, k, v = (F.pad(t, (0, lacking)) for t in (q, k, v))
        answer = self.operator(q, k, v, training, width**-0.5)[0]
        return answer[..., :width] if lacking else answer


def sdpa_kernel(name: str) -> SDPAKernel:
    return SDPAKernel(getattr(SDPBackend, name))


BACKENDS = sdpa, *(SDPAKernel(name) for name in _OPERATORS if name != SDPBackend.MATH)


def memory_efficient(attention_op: SDPBackend | Attend | None = None) -> Attend:
    """The kernel that such an option stands for; off CUDA a backend comes with a warning."""
    if callable(attention_op):
        return attention_op
    kernel = SDPAKernel() if attention_op is None else SDPAKernel(attention_op)
    if not torch.cuda.is_available():
        warnings.warn("memory-efficient attention: no CUDA here, so the default SDPA answers", stacklevel=3)
    return kernel


class Attention(CallableSlots, nn.Module):
    """Four projections around a kernel. `x` asks, `context` answers."""

    attend: Attend
    seams = ("attend", "override")

    def __init__(self, dim: int, context_dim: int, heads: int, *, bias: bool = False, attend: Attend = sdpa):
        super().__init__()
        self.heads = heads
        if attend is not sdpa or not hasattr(type(self), "attend"):  # which a subclass may have of its own
            self.attend = attend
        self.slice_size: int | None = None  # heads at a time
        self.override: Attend | None = None  # a backend that takes precedence over slicing
        self.to_q = Linear(dim, dim, bias=bias)
        self.to_k = Linear(context_dim, dim, bias=bias)
        self.to_v = Linear(context_dim, dim, bias=bias)
        self.to_out = Linear(dim, dim)

    @property
    def is_softmax(self) -> bool:
        """Whether the kernel is one that is known to weigh the keys by a softmax."""
        return self.attend is sdpa and (self.override is None or isinstance(self.override, SDPAKernel))

    def answer(self, x: Tensor, context: Tensor, *qkv: Tensor) -> Tensor:
        kernel = self.override or (sliced(self.slice_size, self.attend) if self.slice_size else self.attend)
        projected = linear(x, *qkv).chunk(3, dim=-1) if qkv else (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in projected)
        attended = (
            autotuned("attend", BACKENDS, q, k, v)
            if kernel is sdpa
            else check_attention_output(kernel, kernel(q, k, v), q)
        )
        return self.to_out(rearrange(attended, "b h n d -> b n (h d)"))


class SelfAttention(Attention):
    """Every token of the normalised x asks every other."""

    def __init__(self, dim: int, heads: int, *, eps: float = 1e-5, bias: bool = False, attend: Attend = sdpa):
        super().__init__(dim, dim, heads, bias=bias, attend=attend)
        self.norm = nn.LayerNorm(dim, eps)

    def qkv(self) -> tuple[Tensor, ...]:
        """The weights of the three projections of x as one, and the biases if any; nothing, where one is not plain."""
        layers = self.to_q, self.to_k, self.to_v
        if any(type(layer) is not Linear or type(layer.weight) is not nn.Parameter for layer in layers):
            return ()
        weight, biases = torch.cat(tuple(layer.weight for layer in layers)), tuple(layer.bias for layer in layers)
        return (weight,) if self.to_q.bias is None else (weight, torch.cat(biases))

    def forward(self, x: Tensor, *qkv: Tensor) -> Tensor:
        """x: b n c; `qkv`, if they are at hand, what the method of this name makes."""
        x = self.norm(x)
        return self.answer(x, x, *qkv)


class CrossAttention(Attention):
    """The image asks, the context answers.

    A softmax over one key is 1 whatever the query, so a context of one token is answered by
    `to_out(to_v(context))` at every position, in every step. That is exact, and the usual case here. The query,
    the key and the norm then change nothing; in training their gradients are zero. A kernel of one's own
    is asked all the same.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, *, attend: Attend = sdpa):
        super().__init__(dim, context_dim, heads, attend=attend)
        self.norm = nn.LayerNorm(dim)

    def prepare(self, context: Tensor) -> Precomputed | Tensor:
        """The answer (b 1 c), the same at every position, where it needs no question; else the context as it is."""
        if context.shape[1] > 1 or not self.is_softmax:
            return context
        answer = self.to_out(self.to_v(context))
        return Precomputed(answer + self.nothing() if torch.is_grad_enabled() else answer)

    def forward(self, x: Tensor, context: Tensor | Precomputed) -> Tensor:
        told = context if isinstance(context, Precomputed) else self.prepare(context)
        return told.value if isinstance(told, Precomputed) else self.answer(self.norm(repeat_to_batch(x, told)), told)

    def nothing(self) -> Tensor:
        """Zero, from the parameters that one token leaves out: so trainers find a gradient, and it is zero."""
        left_out = (*self.norm.parameters(), *self.to_q.parameters(), *self.to_k.parameters())
        return 0 * sum((parameter.sum() for parameter in left_out), start=torch.zeros(()))


class PixelAttention(Attention):
    """Every pixel of the normalised x asks every other, with one head: the autoencoder's kind."""

    def __init__(self, dim: int, *, groups: int, eps: float, attend: Attend = sdpa):
        super().__init__(dim, dim, 1, bias=True, attend=attend)
        self.norm = GroupNorm(groups, dim, eps)

    def forward(self, x: Tensor) -> Tensor:
        pixels = rearrange(self.norm(x), "b c h w -> b (h w) c")
        return x + rearrange(self.answer(pixels, pixels), "b (h w) c -> b c h w", h=x.shape[2])


def attention_layers(model: nn.Module) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def set_attend(model: nn.Module, attend: Attend) -> None:
    """Give every attention layer of `model` this kernel: a function, or a module with weights."""
    if not callable(attend) or not isinstance(model, nn.Module):
        raise InputTypeError(
            f"set_attend({type(model).__name__}, {short_repr(attend)}): a model, and a function of q, k and v, would do"
        )
    if not (layers := attention_layers(model)):
        raise InputError(f"set_attend: {type(model).__name__} has no attention layers of imvar", key="model")
    for layer in layers:
        layer.attend = attend


class AttentionMixin:
    """What a model with attention layers lets its user choose about them."""

    def set_attention_slice(self, slice_size: str | int | Sequence[int] | None = "auto") -> None:
        """Attend a few heads at a time: "auto" half of them, "max" one, or a number; None for all.

        A sequence has one number per attention layer. Raises `InputError` for more heads than a layer has.
        """
        layers = attention_layers(self)  # type: ignore[arg-type]
        for layer, size in zip(layers, slice_sizes(slice_size, [layer.heads for layer in layers]), strict=True):
            layer.slice_size = size

    def enable_xformers_memory_efficient_attention(self, attention_op: SDPBackend | Attend | None = None) -> None:
        """Attend with PyTorch's memory-efficient backend on CUDA, another `SDPBackend`, or any callable.

        Takes precedence over slicing. Off CUDA a backend is the default SDPA, with a warning. No xformers needed.
        """
        override = memory_efficient(attention_op)
        for layer in attention_layers(self):  # type: ignore[arg-type]
            layer.override = override

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Back to each layer's own kernel, sliced if slicing is on."""
        for layer in attention_layers(self):  # type: ignore[arg-type]
            layer.override = None


def slice_sizes(slice_size: str | int | Sequence[int] | None, heads: list[int]) -> Sequence[Any]:
    """One slice size per layer of `heads`, checked."""
    if slice_size is None:
        return [None] * len(heads)
    if isinstance(slice_size, str) and slice_size in ("auto", "max"):
        return [1 if slice_size == "max" else max(n // 2, 1) for n in heads]
    sizes = list(slice_size) if isinstance(slice_size, (list, tuple)) else [slice_size] * len(heads)
    if len(sizes) != len(heads):
        raise InputError(f"slice_size: {len(sizes)} numbers for {len(heads)} attention layers")
    return [check_int("slice_size", size, high=most) for size, most in zip(sizes, heads, strict=True)]
