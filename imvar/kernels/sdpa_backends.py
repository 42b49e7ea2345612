"""PyTorch's scaled dot product attention, and each of its backends chosen for single calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from ..errors import InputError, InputTypeError, invalid, short_repr

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (b, h, n, d), k and v (b, h, m, d) to softmax(q k^T / sqrt(d)) v (b, h, n, d): arXiv:1706.03762, equation 1."""

sdpa: Attend = F.scaled_dot_product_attention

Operator = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Any, ...]]

aten = torch.ops.aten
# Private operators, but the only way to choose a backend for one call rather than for the process
_EFFICIENT, _CUDNN = aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention
_FLASH, _MATH = aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_attention_math
_OPERATORS: dict[SDPBackend, Operator] = {
    SDPBackend.EFFICIENT_ATTENTION: lambda q, k, v, train, scale: _EFFICIENT(q, k, v, None, train, scale=scale),
    SDPBackend.CUDNN_ATTENTION: lambda q, k, v, train, scale: _CUDNN(q, k, v, None, train, scale=scale),
    SDPBackend.FLASH_ATTENTION: lambda q, k, v, train, scale: _FLASH(q, k, v, scale=scale),
    SDPBackend.MATH: lambda q, k, v, train, scale: _MATH(q, k, v, scale=scale),
}
_HALF = torch.float16, torch.bfloat16
_DTYPES = {  # some backends return garbage for others
    SDPBackend.EFFICIENT_ATTENTION: (*_HALF, torch.float32),
    SDPBackend.CUDNN_ATTENTION: _HALF,
    SDPBackend.FLASH_ATTENTION: _HALF,
    SDPBackend.MATH: (*_HALF, torch.float32, torch.float64),
}
HEAD_WIDTH_MULTIPLE = 8  # every backend needs heads of a multiple of this


@dataclass(frozen=True)
class SDPAKernel:
    """An attention kernel that calls one SDPA backend, without touching PyTorch's process-wide flags.

    On CUDA it calls the backend's operator, with heads padded by zeros to a multiple of 8; elsewhere the default SDPA.
    """

    name: SDPBackend = SDPBackend.EFFICIENT_ATTENTION
    operator: Operator = field(init=False, repr=False, compare=False)
    dtypes: tuple[torch.dtype, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, SDPBackend) or self.name not in _OPERATORS:
            names = ", ".join(backend.name for backend in _OPERATORS)
            expected = f"an SDPBackend out of {names}, or a callable"
            raise invalid(InputError, "attention_op", expected, short_repr(self.name))
        vars(self).update(operator=_OPERATORS[self.name], dtypes=_DTYPES[self.name])  # torch.compile cannot look it up

    def __reduce__(self) -> tuple[Any, ...]:  # SDPBackend itself cannot be pickled
        return sdpa_kernel, (self.name.name,)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.is_cuda:
            return sdpa(q, k, v)
        if q.dtype not in self.dtypes:
            expected = f"queries of {' or '.join(map(str, self.dtypes))} for {self.name.name}"
            raise invalid(InputTypeError, "attention_op", expected, str(q.dtype))
        training = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        width, padding = q.shape[-1], -q.shape[-1] % HEAD_WIDTH_MULTIPLE
        if padding:
            q, k, v = (F.pad(t, (0, padding)) for t in (q, k, v))
        out = self.operator(q, k, v, training, width**-0.5)[0]
        return out[..., :width] if padding else out


def sdpa_kernel(name: str) -> SDPAKernel:
    """Return the kernel of a backend by its name, as pickles hold it."""
    return SDPAKernel(getattr(SDPBackend, name))


CANDIDATES = sdpa, *(SDPAKernel(name) for name in _OPERATORS if name != SDPBackend.MATH)
"""The kernels that autotuning chooses from; the first is the default."""
