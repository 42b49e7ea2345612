"""The UNet's blocks: transformers over the pixels of a feature map, and the down, middle and up blocks around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import InputError, invalid
from ..outputs import Transformer2DModelOutput
from .attention import CrossAttention, SelfAttention
from .conditioning import Precomputed, entry, repeat_to_batch
from .layers import FeedForward, GradientCheckpointingMixin, ResnetBlock, UnreadAttributes, refuse_unsupported
from .ops import Conv2d, GroupNorm
from .regions import RegionalContext
from .stock import are_stock, is_stock

BlockMerge = Callable[[Tensor, Tensor], Tensor]
"""Joins a feature map (b, c, h, w) and a skip connection (b, d, h, w): (b, c + d, h, w)."""


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the image embedding, feed-forward; each with a residual."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def precompute(self, context: Tensor | RegionalContext) -> Precomputed:
        """Attend to a context, if that does not depend on the latents, and fuse the projections of self-attention."""
        fuse = isinstance(self.attn1, SelfAttention) and is_stock(self.attn1)
        return Precomputed(precompute_with(self.attn2, context), self.attn1.fused_qkv() if fuse else ())

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        encoder_hidden_states: Tensor | Precomputed | None = None,
        **more: Any,
    ) -> Tensor:
        """(b, n, dim) and a context (k b, m, context_dim) to (k b, n, dim)."""
        refuse_unsupported("TransformerBlock", attention_mask=attention_mask, **more)
        x, context, qkv = hidden_states, encoder_hidden_states, ()
        if isinstance(context, Precomputed):
            context, qkv = context
        normed = self.norm1(x)
        x = x + (self.attn1.forward_fused(normed, qkv) if qkv else self.attn1(normed))
        attended = context.value if isinstance(context, Precomputed) else self.attend_to(x, context)
        x = repeat_to_batch(x, attended) + attended
        return x + self.ff(self.norm3(x))

    def attend_to(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return the output of cross-attention; over a single token without computing the query, if nothing needs it.

        The parameters left out then get a zero gradient, as they do in the full computation.
        """
        attn: Any = self.attn2
        ignores_query = isinstance(attn, CrossAttention) and context is not None and attn.ignores_query(context)
        if not ignores_query or not are_stock(self.norm2):
            x = x if context is None else repeat_to_batch(x, context)
            return attn(self.norm2(x), encoder_hidden_states=context)
        out = attn.single_token_output(context)  # type: ignore[arg-type]
        if torch.is_grad_enabled():
            unused = (*self.norm2.parameters(), *attn.to_q.parameters(), *attn.to_k.parameters())
            out = out + 0 * sum((parameter.sum() for parameter in unused), start=torch.zeros((), device=out.device))
        return out


class Transformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, with a residual."""

    def __init__(self, channels: int, context_dim: int, heads: int, *, depth: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = Conv2d(channels, channels, 1)
        blocks = [TransformerBlock(channels, context_dim, heads) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = Conv2d(channels, channels, 1)

    def precompute(self, context: Tensor | RegionalContext) -> Precomputed:
        return Precomputed([precompute_with(block, context) for block in self.transformer_blocks])

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | Precomputed | None = None,
        timestep: None = None,
        *,
        return_dict: bool = True,
        **more: Any,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """(b, channels, h, w) and a context (k b, m, context_dim) to (k b, channels, h, w)."""
        refuse_unsupported("Transformer", timestep=timestep, **more)
        pixels = rearrange(self.proj_in(self.norm(hidden_states)), "b c h w -> b (h w) c")
        for i, block in enumerate(self.transformer_blocks):
            context = entry(encoder_hidden_states, i)
            if isinstance(context, Tensor) and type(block) is not TransformerBlock:  # which repeats as late as it can
                pixels = repeat_to_batch(pixels, context)
            pixels = block(pixels, encoder_hidden_states=context)
        out = self.proj_out(rearrange(pixels, "b (h w) c -> b c h w", h=hidden_states.shape[2]))
        out = repeat_to_batch(hidden_states, out) + out
        return Transformer2DModelOutput(out) if return_dict else (out,)


class UNetBlock(nn.Module):
    """One resolution of the UNet: resnet blocks, each followed by a transformer if the block has any.

    `temb` is the timestep embedding (b, time_dim), `encoder_hidden_states` the context (k b, m, context_dim); either
    may be `Precomputed`, with one entry per resnet block or transformer.
    """

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module]):
        super().__init__()
        if attentions:  # as published: a block without attention has no such attribute
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)

    @property
    def has_cross_attention(self) -> bool:
        """Whether `forward` takes a context: what a UNet's forward of one's own checks, as diffusers' does."""
        return hasattr(self, "attentions")

    @property
    def transformers(self) -> list[Any]:
        return list(getattr(self, "attentions", ()))

    def layer(self, i: int, x: Tensor, temb: Any, context: Any) -> Tensor:
        """Apply resnet block i and, if there is one, transformer i."""
        resnet, temb = self.resnets[i], entry(temb, i)
        if isinstance(temb, Tensor) and type(resnet) is not ResnetBlock:
            temb = repeat_to_batch(temb, x)
        x = resnet(x, temb)
        if i >= len(self.transformers):
            return x
        transformer, context = self.transformers[i], entry(context, i)
        if isinstance(context, Tensor) and type(transformer) is not Transformer:
            x = repeat_to_batch(x, context)
        if isinstance(transformer, Transformer):
            out = transformer(x, encoder_hidden_states=context, return_dict=False)
        else:
            out = transformer(x, context)
        return out if isinstance(out, Tensor) else out[0]  # a fork's may return a tensor


class DownBlock(UNetBlock):
    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module], downsample: nn.Module | None):
        super().__init__(resnets, attentions)
        self.downsamplers = None if downsample is None else nn.ModuleList([downsample])

    def forward(
        self, hidden_states: Tensor, temb: Any = None, encoder_hidden_states: Any = None, **more: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the feature map for the next block, and every feature map for the skip connections."""
        refuse_unsupported("DownBlock", **more)
        x, skips = hidden_states, ()
        for i in range(len(self.resnets)):
            x = self.layer(i, x, temb, encoder_hidden_states)
            skips += (x,)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips += (x,)
        return x, skips


class MidBlock(UNetBlock):
    def forward(
        self, hidden_states: Tensor, temb: Any = None, encoder_hidden_states: Any = None, **more: Any
    ) -> Tensor:
        refuse_unsupported("MidBlock", **more)
        x = self.layer(0, hidden_states, temb, encoder_hidden_states)
        return self.layer(1, x, temb, encoder_hidden_states)


class UpBlock(UnreadAttributes, GradientCheckpointingMixin, UNetBlock):
    unread_ = dict.fromkeys(("s1", "s2", "b1", "b2"), "call enable_freeu of the UNet")

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module], upsample: nn.Module | None):
        super().__init__(resnets, attentions)
        self.upsamplers = None if upsample is None else nn.ModuleList([upsample])

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Any = None,
        encoder_hidden_states: Any = None,
        *,
        upsample_size: tuple[int, int] | None = None,
        merge: BlockMerge | None = None,
        **more: Any,
    ) -> Tensor:
        """Merge the skip connections, last first, and upsample, to `upsample_size` where the size was odd."""
        refuse_unsupported("UpBlock", **more)
        x, merge = hidden_states, merge or concat_skip
        for i, skip in zip(range(len(self.resnets)), reversed(res_hidden_states_tuple), strict=True):
            merged = merge(x, skip)  # outside of checkpoints, so that a merge with a state runs once
            x = self.maybe_checkpoint(self.layer, i, merged, temb, encoder_hidden_states)
        return x if self.upsamplers is None else self.maybe_checkpoint(self.upsamplers[0], x, upsample_size)


def precompute_with(layer: Any, conditioning: Tensor | RegionalContext) -> Any:
    """Return what a stock layer precomputes; for any other the plain conditioning, which cannot be regions."""
    out = layer.precompute(conditioning) if is_stock(layer) and hasattr(layer, "precompute") else conditioning
    if isinstance(out, RegionalContext):
        got = f"{type(layer).__name__}, which needs the query or is custom"
        raise invalid(InputError, "regions", "layers with the same output at every position", got)
    return out


def concat_skip(h: Tensor, skip: Tensor, block: int | None = None) -> Tensor:
    """Concatenate a skip connection, the UNet's default merge."""
    return torch.cat([h, skip], dim=1)
