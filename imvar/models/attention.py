"""Attention layers, and the kernels that they call.

A layer's `attend` is its kernel: any callable of q, k and v; a module's weights are saved with the model. Attention
slicing and a memory-efficient backend are set per model and apply to the default kernel. A custom one is never
replaced, and sliced only if it has an attribute `sliceable = True`: it computes each head of each sample on its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from ..checks import check_int, check_type
from ..errors import InputError, InputTypeError, describe, invalid, short_repr, warn_user
from .conditioning import Precomputed
from .layers import CallableSlots, Replacement, UnreadAttributes, adapt_new, refuse_unsupported, replace_values
from .ops import Attend, GroupNorm, Linear, SDPAKernel, attention, linear, sdpa
from .regions import RegionalContext
from .stock import are_stock
from .validation import check_attention_output

PROCESSOR_HINT = "set_attend replaces kernels, and replace_layers layers"


def sliced(size: int, attend: Attend = sdpa) -> Attend:
    """Return a kernel with the same output that computes `size` heads of one sample at a time, to save memory.

    `attend` gets q (1, size, n, d), and has to compute each head of each sample on its own.
    """
    if not callable(attend):
        raise invalid(InputTypeError, "attend", "a function of q, k and v", short_repr(attend))
    return partial(sliced_attention, check_int("size", size), attend)


def sliced_attention(size: int, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slices = ([heads for sample in t.split(1) for heads in sample.split(size, dim=1)] for t in (q, k, v))
    outputs = [check_attention_output(attend, attend(*qkv), qkv[0]) for qkv in zip(*slices, strict=True)]
    return torch.cat(outputs, dim=1).view_as(q)  # 1 (b h) n d -> b h n d


def memory_efficient(attention_op: SDPBackend | Attend | None = None) -> Attend:
    """Return the kernel that `attention_op` names; warn that a backend has no effect without CUDA."""
    if callable(attention_op):
        return attention_op
    kernel = SDPAKernel() if attention_op is None else SDPAKernel(attention_op)
    if not torch.cuda.is_available():
        warn_user("memory-efficient attention: CUDA is not available, so the default SDPA is used")
    return kernel


class Attention(CallableSlots, nn.Module):
    """Multi-head attention, without the projections, which subclasses name as their checkpoints do."""

    attend: Attend
    slots_ = ("attend", "backend")

    def __init__(self, heads: int, attend: Attend = sdpa):
        super().__init__()
        self.heads = heads
        if attend is not sdpa or not hasattr(type(self), "attend"):  # a subclass may define its own
            self.attend = attend
        self.slice_size: int | None = None  # heads at a time
        self.backend: Attend | None = None  # in place of the default kernel; takes precedence over slicing

    @property
    def unsliced_kernel(self) -> Attend:
        """The layer's own kernel; in place of the default one the backend, or what other code replaced it by."""
        return self.attend if self.attend is not sdpa else self.backend or F.scaled_dot_product_attention

    @property
    def custom_kernel(self) -> Attend | None:
        """The kernel, unless it is known to weigh the values by a softmax over the keys."""
        kernel = self.unsliced_kernel
        return None if kernel is sdpa or isinstance(kernel, SDPAKernel) else kernel

    @property
    def kernel_in_use(self) -> Attend:
        """The kernel, sliced if slicing is on and it computes each head of each sample on its own."""
        kernel = self.unsliced_kernel
        sliceable = kernel is sdpa or getattr(kernel, "sliceable", False)
        return sliced(self.slice_size, kernel) if self.slice_size and sliceable else kernel

    def split_heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)

    def attend_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with q (b, h, n, d) to k and v (b, h, m, d), and join the heads: (b, n, h d)."""
        kernel = self.kernel_in_use
        out = attention(q, k, v) if kernel is sdpa else check_attention_output(kernel, kernel(q, k, v), q)
        return rearrange(out, "b h n d -> b n (h d)")


class QKVAttention(UnreadAttributes, Attention):
    """Attention with the projections `to_q`, `to_k`, `to_v` and `to_out`: the UNet's and the autoencoder's.

    A subclass may override a step: `project_qkv`, `attend_heads` or `project_out`.
    """

    unread_: ClassVar[Mapping[str, str]] = {
        "processor": PROCESSOR_HINT,
        **dict.fromkeys(("norm_q", "norm_k", "norm_cross"), "override project_qkv in a subclass, for replace_layers"),
        **dict.fromkeys(
            ("rescale_output_factor", "residual_connection", "spatial_norm"),
            "override project_out in a subclass, for replace_layers",
        ),
    }

    def __init__(
        self,
        dim: int,
        context_dim: int,
        heads: int,
        *,
        bias: bool = False,
        attend: Attend = sdpa,
        group_norm: nn.Module | None = None,
    ):
        super().__init__(heads, attend)
        if group_norm is not None:
            self.group_norm = group_norm
        self.dim, self.context_dim = dim, context_dim
        self.to_q = Linear(dim, dim, bias=bias)
        self.to_k = Linear(context_dim, dim, bias=bias)
        self.to_v = Linear(context_dim, dim, bias=bias)
        self.to_out = nn.Sequential(Linear(dim, dim), nn.Dropout(0.0))

    @classmethod
    def from_layer(cls, layer: QKVAttention, **options: Any) -> Self:
        """Return a layer of this class around the modules, kernel and settings of another.

        What only this class has keeps its initial values. `options` are further arguments of its constructor.
        """
        if not isinstance(layer, QKVAttention):
            raise invalid(InputTypeError, "layer", "an attention layer with to_q, to_k and to_v", describe(layer))
        new = cls(**layer.sizes, **options)
        weights = [name for name in (*layer._modules, *layer._parameters) if hasattr(new, name) and name != "attend"]
        for name in *weights, "slice_size", "backend", *(() if hasattr(cls, "attend") else ("attend",)):
            setattr(new, name, getattr(layer, name))
        adapt_new(new, layer)
        return new

    @property
    def scale(self) -> float:
        """The factor of the dot products of queries and keys in the default kernel."""
        return (self.dim // self.heads) ** -0.5

    def head_to_batch_dim(self, x: Tensor) -> Tensor:
        """Split the heads of (b, n, dim) as samples: (b h, n, d), for a forward of one's own."""
        return rearrange(x, "b n (h d) -> (b h) n d", h=self.heads)

    def batch_to_head_dim(self, x: Tensor) -> Tensor:
        """Join heads that were split as samples: (b h, n, d) to (b, n, dim)."""
        return rearrange(x, "(b h) n d -> b n (h d)", h=self.heads)

    def set_processor(self, processor: Any) -> None:
        """Raise `InputError`."""
        raise invalid(InputError, "set_processor", "no processor", short_repr(processor), PROCESSOR_HINT)

    @property
    def sizes(self) -> dict[str, Any]:
        """The arguments that a class for the same place is built with."""
        return {"dim": self.dim, "context_dim": self.context_dim, "heads": self.heads}

    def project_qkv(self, hidden_states: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project (b, n, dim) to queries (b, h, n, d), and a context (b, m, context_dim) to keys and values."""
        q, k, v = self.to_q(hidden_states), self.to_k(context), self.to_v(context)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def project_out(self, attended: Tensor) -> Tensor:
        """Project the joined heads (b, n, dim)."""
        return self.to_out(attended)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        **more: Any,
    ) -> Tensor:
        """Queries (b, n, dim) over a context (b, m, context_dim), by default over themselves, to (b, n, dim)."""
        refuse_unsupported("attention", attention_mask=attention_mask, **more)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return self.project_out(self.attend_heads(*self.project_qkv(hidden_states, context)))


class SelfAttention(QKVAttention):
    """Attention of a sequence over itself."""

    def __init__(self, dim: int, heads: int, *, attend: Attend = sdpa):
        super().__init__(dim, dim, heads, attend=attend)

    @property
    def sizes(self) -> dict[str, Any]:
        return {"dim": self.dim, "heads": self.heads}

    def fused_qkv(self) -> tuple[Tensor, ...]:
        """Return the weights of the three projections as one, and their biases; () where one is not a plain layer."""
        layers = self.to_q, self.to_k, self.to_v
        if any(type(layer) is not Linear or type(layer.weight) is not nn.Parameter for layer in layers):
            return ()
        weight, biases = torch.cat(tuple(layer.weight for layer in layers)), tuple(layer.bias for layer in layers)
        return (weight,) if self.to_q.bias is None else (weight, torch.cat(biases))

    def forward_fused(self, hidden_states: Tensor, qkv: tuple[Tensor, ...]) -> Tensor:
        """Compute `forward(hidden_states)` with what `fused_qkv` returned."""
        q, k, v = linear(hidden_states, *qkv).chunk(3, dim=-1)
        return self.project_out(self.attend_heads(self.split_heads(q), self.split_heads(k), self.split_heads(v)))


class CrossAttention(QKVAttention):
    """Queries come from the latents, keys and values from the context.

    A softmax over one key is 1 for every query, so over a context of one token the output is `to_out(to_v(context))`
    at every position. That is exact, and the usual case here: `single_token_output` computes it without the query.
    """

    def ignores_query(self, context: Tensor) -> bool:
        """Return whether the output does not depend on the query, and no hook or custom layer needs the query."""
        return (
            context.shape[1] == 1
            and not torch.jit.is_tracing()  # for any number of tokens  # pyright: ignore[reportPrivateImportUsage]
            and self.custom_kernel is None
            and are_stock(*self.modules())
        )

    def single_token_output(self, context: Tensor) -> Tensor:
        """Return the output (b, 1, dim), the same at every position, for a context (b, 1, context_dim)."""
        return self.to_out(self.to_v(context))

    def precompute(self, context: Tensor | RegionalContext) -> Precomputed | Tensor | RegionalContext:
        """Return the output where it does not depend on the query, else the context."""
        if isinstance(context, RegionalContext):
            ignores_query = self.ignores_query(context.contexts[0])
            return Precomputed(context.attend(self.single_token_output)) if ignores_query else context
        return Precomputed(self.single_token_output(context)) if self.ignores_query(context) else context


class PixelAttention(QKVAttention):
    """Single-head self-attention over all pixels, with group norm and a residual: the autoencoder's kind."""

    def __init__(self, dim: int, *, groups: int, eps: float, attend: Attend = sdpa):
        super().__init__(dim, dim, 1, bias=True, attend=attend, group_norm=GroupNorm(groups, dim, eps))

    @property
    def sizes(self) -> dict[str, Any]:
        norm: Any = self.group_norm
        return {"dim": self.dim, "groups": norm.num_groups, "eps": norm.eps}

    def forward(self, hidden_states: Tensor, temb: None = None, **more: Any) -> Tensor:  # type: ignore[override]
        """(b, dim, h, w) to the same shape."""
        refuse_unsupported("attention", temb=temb, **more)
        pixels = rearrange(self.group_norm(hidden_states), "b c h w -> b (h w) c")
        out = super().forward(pixels)
        return hidden_states + rearrange(out, "b (h w) c -> b c h w", h=hidden_states.shape[2])


def attention_layers(model: nn.Module) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def set_attend(model: nn.Module, attend: Attend, kind: type[Attention] = Attention, where: str = "*") -> Replacement:
    """Set the kernel of attention layers of `model`: a function of q, k and v, or a module with weights.

    `kind`: only layers of this class. `where`: only those whose names match, as in `replace_layers`. Returns the number
    of layers, with `undo()`.
    """
    if not isinstance(model, nn.Module):
        raise invalid(InputTypeError, "model", "a module", describe(model))
    if not callable(attend):
        raise invalid(InputTypeError, "attend", "a function of q, k and v", short_repr(attend))
    if not isinstance(kind, type) or not issubclass(kind, Attention):
        raise invalid(InputTypeError, "kind", "a class of attention layers", short_repr(kind))
    check_type("where", where, str)
    places: list[tuple[nn.Module, str, Any]] = [
        (layer, "attend", vars(layer).get("attend") or layer._modules.get("attend"))
        for name, layer in model.named_modules()
        if isinstance(layer, kind) and fnmatchcase(name, where)
    ]
    if not places:
        expected = "a model with imvar's attention layers"
        if attention_layers(model):
            expected = f"a model with layers of class {kind.__name__} at {where!r}"
        raise invalid(InputError, "model", expected, type(model).__name__)
    return replace_values(places, [attend] * len(places))


class AttentionMixin:
    """The attention settings of a model."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]  # of a torch module
        except AttributeError:
            if name not in ("attn_processors", "set_attn_processor"):
                raise
            raise AttributeError(
                f"{type(self).__name__} has no {name}: there are no processors; {PROCESSOR_HINT}"
            ) from None

    def set_default_attn_processor(self) -> None:
        """Call `disable_xformers_memory_efficient_attention`; layers and their own kernels stay."""
        self.disable_xformers_memory_efficient_attention()

    def fuse_qkv_projections(self) -> None:
        """Do nothing: the UNet's self-attention layers already run as fused projections, and outputs are the same."""

    def unfuse_qkv_projections(self) -> None:
        """Do nothing."""

    def set_attention_slice(self, slice_size: str | int | Sequence[int] | None = "auto") -> None:
        """Compute a few heads at a time: "auto" half of them, "max" one, or a number; None for all at once.

        A sequence has one number per attention layer. Custom kernels that are not `sliceable` compute all heads at
        once, with a warning. Raises `InputError` for more heads than a layer has.
        """
        layers = attention_layers(self)  # type: ignore[arg-type]
        for layer, size in zip(layers, slice_sizes(slice_size, [layer.heads for layer in layers]), strict=True):
            layer.slice_size = size
        kernels = [(layer.custom_kernel, layer.kernel_in_use) for layer in layers if layer.slice_size]
        if whole := sum(custom is not None and custom == kernel for custom, kernel in kernels):
            hint = "set sliceable = True on a kernel that computes each head on its own"
            warn_user(f"slice_size: {whole} of {len(layers)} attention layers keep a custom kernel unsliced; {hint}")

    def enable_xformers_memory_efficient_attention(self, attention_op: SDPBackend | Attend | None = None) -> None:
        """Use PyTorch's memory-efficient backend on CUDA, another `SDPBackend`, or any callable. Needs no xformers.

        It takes precedence over slicing. Without CUDA a backend is the default SDPA, with a warning. Layers with a
        custom kernel keep it, with a warning.
        """
        backend, layers = memory_efficient(attention_op), attention_layers(self)  # type: ignore[arg-type]
        for layer in layers:
            layer.backend = backend
        if kept := sum(layer.attend is not sdpa for layer in layers):
            hint = "set_attend(model, imvar.sdpa) removes it"
            warn_user(f"attention_op: {kept} of {len(layers)} attention layers keep their custom kernel; {hint}")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Return to each layer's own kernel, sliced if slicing is on."""
        for layer in attention_layers(self):  # type: ignore[arg-type]
            layer.backend = None


def slice_sizes(slice_size: str | int | Sequence[int] | None, heads: list[int]) -> Sequence[Any]:
    """Return a checked slice size for each layer, whose numbers of heads are given."""
    if slice_size is None:
        return [None] * len(heads)
    if isinstance(slice_size, str) and slice_size in ("auto", "max"):
        return [1 if slice_size == "max" else max(n // 2, 1) for n in heads]
    sizes = list(slice_size) if isinstance(slice_size, (list, tuple)) else [slice_size] * len(heads)
    if len(sizes) != len(heads):
        raise invalid(
            InputError, "slice_size", f"one number for each of {len(heads)} attention layers", f"{len(sizes)}"
        )
    return [check_int("slice_size", size, high=high) for size, high in zip(sizes, heads, strict=True)]
