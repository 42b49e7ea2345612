"""The UNet: predicts the noise in latents, given a timestep and an image embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_block_channels, check_float, check_image_size, check_int, check_ints, validated
from ..config import Config, fixed, one_of
from ..errors import InputError, invalid, short_repr
from ..outputs import UNet2DConditionOutput
from ..weights import key_tables
from ..weights.keymap import Keymap
from .attention import AttentionMixin
from .conditioning import Precomputed, entry, repeat_to_batch
from .freeu import FreeU
from .layers import (
    CallableSlots,
    Downsample,
    GradientCheckpointingMixin,
    ResnetBlock,
    TimestepEmbedding,
    Timesteps,
    Upsample,
    first_weight,
    refuse_unsupported,
)
from .lora import LoraMixin
from .ops import Conv2d, GroupNorm, norm_act
from .regions import RegionLayout
from .stock import IMVAR, reasons_for_plain, top_package
from .unet_blocks import DownBlock, MidBlock, Transformer, UpBlock, concat_skip, precompute_with
from .validation import check_residuals, check_unet_inputs

Merge = Callable[[Tensor, Tensor, int], Tensor]
"""Joins a feature map (b, c, h, w) and a skip connection (b, d, h, w) in up block i: (b, c + d, h, w)."""

WITH_ATTENTION, WITHOUT_ATTENTION = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


@dataclass(frozen=True, eq=False, repr=False)
class UNetConfig(Config):
    """`unet/config.json`. `attention_head_dim` is the number of heads, whatever its name says."""

    sample_size: int | Sequence[int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = fixed(False)
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: Sequence[str] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str = fixed("UNetMidBlock2DCrossAttn")
    up_block_types: Sequence[str] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool = fixed(False)
    block_out_channels: Sequence[int] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    downsample_padding: int = fixed(1)
    mid_block_scale_factor: float = fixed(1)
    dropout: float = fixed(0.0)
    act_fn: str = one_of("silu", "swish")
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int = 1
    reverse_transformer_layers_per_block: None = fixed(None)
    encoder_hid_dim: None = fixed(None)
    encoder_hid_dim_type: None = fixed(None)
    attention_head_dim: int | Sequence[int] = 8
    num_attention_heads: None = fixed(None)
    dual_cross_attention: bool = fixed(False)
    use_linear_projection: bool = fixed(False)
    class_embed_type: None = fixed(None)
    addition_embed_type: None = fixed(None)
    addition_time_embed_dim: None = fixed(None)
    num_class_embeds: None = fixed(None)
    upcast_attention: bool = fixed(False)
    resnet_time_scale_shift: str = fixed("default")
    resnet_skip_time_act: bool = fixed(False)
    resnet_out_scale_factor: float = fixed(1.0)
    time_embedding_type: str = fixed("positional")
    time_embedding_dim: int | None = None
    time_embedding_act_fn: None = fixed(None)
    timestep_post_act: None = fixed(None)
    time_cond_proj_dim: None = fixed(None)
    conv_in_kernel: int = fixed(3)
    conv_out_kernel: int = fixed(3)
    projection_class_embeddings_input_dim: None = fixed(None)
    attention_type: str = fixed("default")
    class_embeddings_concat: bool = fixed(False)
    mid_block_only_cross_attention: bool | None = fixed(None)
    cross_attention_norm: None = fixed(None)
    addition_embed_type_num_heads: int = fixed(64)

    def check(self) -> None:
        super().check()
        check_ints(self, "in_channels", "out_channels", "layers_per_block", "transformer_layers_per_block")
        check_ints(self, "cross_attention_dim", "norm_num_groups", "time_embedding_dim")
        check_block_channels(self)
        check_float("norm_eps", self.norm_eps)
        check_image_size("sample_size", self.sample_size)
        if self.freq_shift == self.block_out_channels[0] // 2:
            expected = "a number other than half of block_out_channels[0], from which it is subtracted to divide by"
            raise invalid(InputError, "freq_shift", expected, short_repr(self.freq_shift))
        n_blocks = len(self.block_out_channels)
        for name, i in ("down_block_types", 0), ("up_block_types", 1):
            types, choices = getattr(self, name), (WITH_ATTENTION[i], WITHOUT_ATTENTION[i])
            if len(types) != n_blocks or any(kind not in choices for kind in types):
                expected = f"{n_blocks} of {' or '.join(choices)}, one per entry of block_out_channels"
                raise invalid(InputError, name, expected, short_repr(list(types)))
        if len(self.heads) != n_blocks:
            expected = f"one number, or {n_blocks}, one per entry of block_out_channels"
            raise invalid(InputError, "attention_head_dim", expected, short_repr(self.attention_head_dim))
        for heads in self.heads:
            check_int("attention_head_dim", heads)
        kinds = zip(self.down_block_types, reversed(self.up_block_types), strict=True)
        has_attention = [any(kind in WITH_ATTENTION for kind in both) for both in kinds]
        has_attention[-1] = True  # the mid block has, at the least
        for channels, heads, attends in zip(self.block_out_channels, self.heads, has_attention, strict=True):
            if channels % self.norm_num_groups or (attends and channels % heads):
                expected = f"multiples of norm_num_groups={self.norm_num_groups} and of attention_head_dim={heads}"
                raise invalid(InputError, "block_out_channels", expected, str(channels))

    @property
    def heads(self) -> Sequence[int]:
        """The number of attention heads per block."""
        per_block = self.attention_head_dim
        return [per_block] * len(self.block_out_channels) if isinstance(per_block, int) else per_block


class UNet2DConditionModel(CallableSlots, AttentionMixin, GradientCheckpointingMixin, LoraMixin, part="unet"):
    """Down, middle and up blocks with skip connections: eps(x_t, t, context) of arXiv:2112.10752, equation 3.

    Extension points for forks: `block` and `transformer` are the classes it is built of, `merge` joins a skip
    connection.
    """

    config_class = UNetConfig
    config: UNetConfig
    merge: Merge
    freeu: FreeU | None = None
    slots_ = ("merge",)
    block: ClassVar[Callable[..., nn.Module]] = ResnetBlock
    transformer: ClassVar[Callable[..., nn.Module]] = Transformer

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        config, widths = self.config, list(self.config.block_out_channels)
        time_dim = config.time_embedding_dim or 4 * widths[0]
        last, layers = len(widths) - 1, config.layers_per_block

        def resnet(in_channels: int, out_channels: int) -> nn.Module:
            groups, eps = config.norm_num_groups, config.norm_eps
            return self.block(in_channels, out_channels, groups=groups, eps=eps, time_dim=time_dim)

        def make_transformers(number: int, i: int, kind: str | None = None) -> list[nn.Module]:
            sizes = widths[i], config.cross_attention_dim, config.heads[i]
            depth, groups = config.transformer_layers_per_block, config.norm_num_groups
            number = 0 if kind in WITHOUT_ATTENTION else number
            return [self.transformer(*sizes, depth=depth, groups=groups) for _ in range(number)]

        self.conv_in: nn.Conv2d = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_proj = Timesteps(widths[0], config.flip_sin_to_cos, config.freq_shift)
        self.time_embedding = TimestepEmbedding(widths[0], time_dim)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()  # in the published order, before mid_block

        skips = [widths[0]]  # the channels of every skip connection, to be used last first
        for i, (kind, width) in enumerate(zip(config.down_block_types, widths, strict=True)):
            resnets = [resnet(width if j else skips[-1], width) for j in range(layers)]
            downsample = Downsample(width) if i < last else None
            self.down_blocks.append(DownBlock(resnets, make_transformers(layers, i, kind), downsample))
            skips += [width] * (layers + (i < last))

        self.mid_block = MidBlock([resnet(widths[-1], widths[-1]) for _ in range(2)], make_transformers(1, last))

        below = widths[-1]  # the channels from the block below
        for kind, i in zip(config.up_block_types, reversed(range(len(widths))), strict=True):
            width = widths[i]
            resnets = [resnet((width if j else below) + skips.pop(), width) for j in range(layers + 1)]
            upsample = Upsample(width) if i else None
            self.up_blocks.append(UpBlock(resnets, make_transformers(layers + 1, i, kind), upsample))
            below = width

        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out: nn.Conv2d = Conv2d(widths[0], config.out_channels, 3, padding=1)
        if not hasattr(type(self), "merge"):  # a subclass may define its own
            self.merge = concat_skip

    @classmethod
    def min_tensor_count(cls, config: UNetConfig) -> int:
        layers, depth = config.layers_per_block, config.transformer_layers_per_block
        down, up = list(config.down_block_types), list(config.up_block_types)
        transformers = 1 + layers * down.count(WITH_ATTENTION[0]) + (layers + 1) * up.count(WITH_ATTENTION[1])
        return (2 * layers + 1) * len(config.block_out_channels) + depth * transformers

    @property
    def keymap(self) -> Keymap:
        up = [kind in WITH_ATTENTION for kind in self.config.up_block_types]
        return key_tables.unet(up, self.config.layers_per_block)

    @property
    def named_blocks(self) -> dict[str, Any]:
        """All blocks by name, in the order in which they run."""
        down, up = self.down_blocks.named_children(), self.up_blocks.named_children()
        return {
            **{f"down_blocks.{i}": block for i, block in down},
            "mid_block": self.mid_block,
            **{f"up_blocks.{i}": block for i, block in up},
        }

    @property
    def blocks(self) -> list[Any]:
        """All blocks, in the order in which they run."""
        return list(self.named_blocks.values())

    @property
    def attention_levels(self) -> dict[str, int]:
        """The names of the blocks with attention, and how often the sides of the latents are halved for them."""
        last = len(self.down_blocks) - 1
        levels = [*range(last + 1), last, *reversed(range(last + 1))]
        blocks = zip(self.named_blocks.items(), levels, strict=True)
        return {name: level for (name, block), level in blocks if block.transformers}

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Timesteps (n,) to embeddings (n, time_dim)."""
        weight, waves = first_weight(self.time_embedding), self.time_proj(timesteps)
        return self.time_embedding(waves if weight is None else waves.to(weight.dtype))

    def precompute_time(self, timesteps: Tensor) -> Precomputed:
        """Embed and project timesteps (n,) for each resnet block: a tensor with n rows each."""
        temb = self.embed_time(timesteps)
        return Precomputed([Precomputed([precompute_with(r, temb) for r in block.resnets]) for block in self.blocks])

    def precompute_context(self, context: Tensor, regions: RegionLayout | None = None) -> Precomputed:
        """Attend to a context (b, m, c) in each transformer, as far as that does not depend on the latents.

        `regions` lays out the tokens of the context over the latents. Raises `InputError` for a scale that names a
        block without attention, and for a layer whose output would still depend on the latents.
        """
        contexts: Mapping[str, Any] = dict.fromkeys(self.named_blocks, context)
        if regions is not None:
            contexts = regions.by_block(context, self.attention_levels)
        return Precomputed(
            [
                Precomputed([precompute_with(transformer, contexts[name]) for transformer in block.transformers])
                for name, block in self.named_blocks.items()
            ]
        )

    def why_plain(self) -> list[str]:
        """Return what keeps this UNet from being precomputed, cached or compiled, by layer; empty if nothing does."""
        blocks = {type(block) for block in (self, *self.blocks) if top_package(type(block).forward) != IMVAR}
        reasons = (
            f"{block.__name__} has its own forward, which precomputed conditioning does not reach" for block in blocks
        )
        return [*reasons_for_plain(self), *reasons]

    def merge_skip(self, h: Tensor, skip: Tensor, block: int) -> Tensor:
        """Rescale by FreeU, if it is enabled, and merge a feature map and a skip connection in up block `block`."""
        return (
            self.merge(h, skip, block) if self.freeu is None else self.merge(*self.freeu.rescale(h, skip, block), block)
        )

    @validated(check_unet_inputs)
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | Precomputed,
        encoder_hidden_states: Tensor | Precomputed,
        *unsupported: None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        merge: Merge | None = None,
        return_dict: bool = True,
        **more: None,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict the noise in `sample` (b, c, h, w) at `timestep` (one, or one per sample).

        `encoder_hidden_states`: (b, m, cross_attention_dim), m tokens that describe the image; this model has 1. With
        (k b, m, cross_attention_dim), k contexts per sample, the output is (k b, c, h, w): all samples with their
        first context, then all with their second. Either may be `Precomputed`. The residuals of a ControlNet
        (arXiv:2302.05543) are added to the skip connections and to the output of the mid block; each is of b or k b
        samples. `merge` joins the skip connections of this call. Raises `InputError` for further arguments of
        diffusers', unless they are None.
        """
        more.update({f"positional argument {i + 4}": value for i, value in enumerate(unsupported)})
        refuse_unsupported("UNet2DConditionModel", **more)
        merge = self.merge_skip if merge is None else merge
        x, temb, context = self.conv_in(sample), timestep, encoder_hidden_states
        if not isinstance(temb, Precomputed):
            temb = self.embed_time(torch.as_tensor(temb, device=x.device).expand(x.shape[0]))

        skips, i = (x,), 0  # i counts the blocks
        for block in self.down_blocks:
            x, block_skips = self.maybe_checkpoint(
                block, hidden_states=x, temb=entry(temb, i), encoder_hidden_states=entry(context, i)
            )
            skips, i = skips + block_skips, i + 1
        x = self.maybe_checkpoint(self.mid_block, x, entry(temb, i), encoder_hidden_states=entry(context, i))
        if down_block_additional_residuals is not None:
            residuals: tuple[Any, ...] = (*down_block_additional_residuals, mid_block_additional_residual)
            check_residuals(residuals, (*skips, x), len(sample))
            pairs = zip((*skips, x), residuals, strict=True)
            summed = tuple(repeat_to_batch(h, x) + repeat_to_batch(residual, x) for h, residual in pairs)
            skips, x = summed[:-1], summed[-1]
        for j, block in enumerate(self.up_blocks):
            i, n = i + 1, len(block.resnets)  # type: ignore[arg-type]
            skips, block_skips = skips[:-n], tuple(repeat_to_batch(skip, x) for skip in skips[-n:])
            x = block(
                hidden_states=x,
                temb=entry(temb, i),
                res_hidden_states_tuple=block_skips,
                encoder_hidden_states=entry(context, i),
                upsample_size=skips[-1].shape[2:] if skips else None,  # of the next skip connection: sizes may be odd
                merge=lambda h, skip, j=j: merge(h, skip, j),
            )

        sample = self.conv_out(norm_act(self.conv_norm_out, self.conv_act, x))
        return UNet2DConditionOutput(sample) if return_dict else (sample,)

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Rescale what `merge` joins by FreeU (arXiv:2309.11497); usual here: s1 0.9, s2 0.2, b1 1.2, b2 1.4."""
        self.freeu = FreeU(s1, s2, b1, b2)

    def disable_freeu(self) -> None:
        """Join skip connections by `merge` alone."""
        self.freeu = None
