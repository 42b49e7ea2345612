"""The UNet's transformer: where the picture that is being made meets the one that it is told."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from .attention import CrossAttention, SelfAttention
from .layers import Conv2d, FeedForward, GroupNorm
from .stock import Precomputed, precompute, repeat_to_batch


class TransformerBlock(nn.Module):
    """Look around, look at the picture, think; each added to what came in."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.self_attn = SelfAttention(dim, heads)
        self.cross_attn = CrossAttention(dim, context_dim, heads)
        self.feed_forward = FeedForward(dim)

    def prepare(self, context: Tensor) -> Precomputed:
        return Precomputed(precompute(self.cross_attn, context))

    def forward(self, x: Tensor, context: Tensor | Precomputed) -> Tensor:
        told = context if isinstance(context, Precomputed) else self.prepare(context)
        x = x + self.self_attn(x, *told.weights)
        answer = self.cross_attn(x, told.value)
        x = repeat_to_batch(x, answer) + answer
        return x + self.feed_forward(x)


class Transformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, around an identity."""

    def __init__(self, channels: int, context_dim: int, heads: int, *, depth: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = Conv2d(channels, channels, 1)
        self.blocks = nn.ModuleList(TransformerBlock(channels, context_dim, heads) for _ in range(depth))
        self.proj_out = Conv2d(channels, channels, 1)

    def prepare(self, context: Tensor) -> Precomputed:
        return Precomputed([precompute(block, context) for block in self.blocks])

    def forward(self, x: Tensor, context: Tensor | Precomputed) -> Tensor:
        told = context if isinstance(context, Precomputed) else self.prepare(context)
        pixels = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block, own in zip(self.blocks, told.value, strict=True):
            pixels = block(pixels, own)
        return repeat_to_batch(x, pixels) + self.proj_out(rearrange(pixels, "b (h w) c -> b c h w", h=x.shape[2]))
