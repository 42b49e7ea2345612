"""The UNet that predicts the noise in latents, told the time and the picture's embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_block_channels, check_float, check_image_size, check_int, check_ints, validated
from ..config import Config, fixed, one_of
from ..errors import InputError, short_repr
from ..outputs import UNet2DConditionOutput
from ..weights import key_tables as tables
from ..weights.keymap import Keymap
from ..weights.pretrained import PretrainedModel
from . import validation as inputs
from .attention import AttentionMixin
from .freeu import FreeU
from .layers import (
    CallableSlots,
    Conv2d,
    Downsample,
    GradientCheckpointingMixin,
    GroupNorm,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    norm_silu,
)
from .stock import Precomputed, precompute, repeat_to_batch
from .transformer import Transformer
from .unet_blocks import DownBlock, MidBlock, UpBlock

Merge = Callable[[Tensor, Tensor, int], Tensor]
"""h: b c h w, skip: b d h w, the level counted from the coarsest; answer: b c+d h w."""

WITH_ATTENTION, WITHOUT = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


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
        check_ints(
            self,
            "in_channels",
            "out_channels",
            "layers_per_block",
            "transformer_layers_per_block",
            "cross_attention_dim",
            "norm_num_groups",
            "time_embedding_dim",
        )  # one for all levels
        check_block_channels(self)
        check_float("norm_eps", self.norm_eps)
        check_image_size("sample_size", self.sample_size)
        if self.freq_shift == self.block_out_channels[0] // 2:
            raise InputError(
                f"freq_shift={self.freq_shift}: another number than half of block_out_channels[0], which "
                "it is subtracted from to divide by, would do",
                key="freq_shift",
            )
        number = len(self.block_out_channels)
        for name, i in ("down_block_types", 0), ("up_block_types", 1):
            types, kinds = getattr(self, name), (WITH_ATTENTION[i], WITHOUT[i])
            if len(types) != number or any(kind not in kinds for kind in types):
                raise InputError(
                    f"{name}={short_repr(list(types))}: {number} of {' or '.join(kinds)} would do, one per "
                    f"entry of block_out_channels={list(self.block_out_channels)}",
                    key=name,
                )
        if len(self.heads) != number:
            raise InputError(
                f"attention_head_dim={short_repr(self.attention_head_dim)}: one number, or one per level, would do",
                key="attention_head_dim",
            )
        for heads in self.heads:
            check_int("attention_head_dim", heads)
        kinds = zip(self.down_block_types, reversed(self.up_block_types), strict=True)
        attends = [any(kind in WITH_ATTENTION for kind in both) for both in kinds]
        attends[-1] = True  # in the middle, at the least
        for channels, heads, attend in zip(self.block_out_channels, self.heads, attends, strict=True):
            if channels % self.norm_num_groups or (attend and channels % heads):
                raise InputError(
                    f"block_out_channels: {channels} cannot be split into {heads} heads "
                    f"(attention_head_dim) and {self.norm_num_groups} groups (norm_num_groups)",
                    key="block_out_channels",
                )

    @property
    def heads(self) -> Sequence[int]:
        per_level = self.attention_head_dim
        return [per_level] * len(self.block_out_channels) if isinstance(per_level, int) else per_level


def concat_skip(h: Tensor, skip: Tensor, level: int) -> Tensor:
    """The usual merge of a skip."""
    return torch.cat([h, skip], dim=1)


class UNet2DConditionModel(CallableSlots, AttentionMixin, GradientCheckpointingMixin, PretrainedModel, part="unet"):
    """Down, middle, up, with skips across: eps(x_t, t, context) of arXiv:2112.10752, equation 3.

    Seams for forks: `block` and `transformer` are the classes it is built of, `merge` joins a skip.
    """

    config_class = UNetConfig
    config: UNetConfig
    merge: Merge
    seams = ("merge",)
    block: ClassVar[Callable[..., nn.Module]] = ResnetBlock
    transformer: ClassVar[Callable[..., nn.Module]] = Transformer

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        config, widths = self.config, list(self.config.block_out_channels)
        time_dim = config.time_embedding_dim or 4 * widths[0]
        last, layers = len(widths) - 1, config.layers_per_block

        def resnet(in_channels: int, out_channels: int) -> nn.Module:
            return self.block(
                in_channels, out_channels, groups=config.norm_num_groups, eps=config.norm_eps, time_dim=time_dim
            )

        def transformers(number: int, level: int, kind: str | None = None) -> list[nn.Module]:
            return [
                self.transformer(
                    widths[level],
                    config.cross_attention_dim,
                    config.heads[level],
                    depth=config.transformer_layers_per_block,
                    groups=config.norm_num_groups,
                )
                for _ in range(number)
                if kind not in WITHOUT
            ]

        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time = TimestepEmbedding(widths[0], time_dim, cos_first=config.flip_sin_to_cos, shift=config.freq_shift)

        self.down, skips = nn.ModuleList(), [widths[0]]  # the channels of every skip, to be used last first
        for level, (kind, width) in enumerate(zip(config.down_block_types, widths, strict=True)):
            resnets = [resnet(width if i else skips[-1], width) for i in range(layers)]
            shrink = Downsample(width) if level < last else None
            self.down.append(DownBlock(resnets, transformers(layers, level, kind), shrink))
            skips += [width] * (layers + (level < last))

        self.mid = MidBlock([resnet(widths[-1], widths[-1]) for _ in range(2)], transformers(1, last))

        self.up, above = nn.ModuleList(), widths[-1]  # the channels that come from below
        for kind, level in zip(config.up_block_types, reversed(range(len(widths))), strict=True):
            width = widths[level]
            resnets = [resnet((width if i else above) + skips.pop(), width) for i in range(layers + 1)]
            grow = Upsample(width) if level else None
            self.up.append(UpBlock(resnets, transformers(layers + 1, level, kind), grow))
            above = width

        self.norm_out = GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, padding=1)
        self.disable_freeu()

    @classmethod
    def min_tensor_count(cls, config: UNetConfig) -> int:
        layers, depth = config.layers_per_block, config.transformer_layers_per_block
        transformers = (
            1
            + layers * list(config.down_block_types).count(WITH_ATTENTION[0])
            + ((layers + 1) * list(config.up_block_types).count(WITH_ATTENTION[1]))
        )
        return (2 * layers + 1) * len(config.block_out_channels) + depth * transformers

    @property
    def keymap(self) -> Keymap:
        config = self.config
        down, up = (
            [kind in WITH_ATTENTION for kind in kinds] for kinds in (config.down_block_types, config.up_block_types)
        )
        return tables.unet(down, up, config.layers_per_block, config.transformer_layers_per_block)

    @property
    def levels(self) -> list[Any]:
        return [*self.down, self.mid, *self.up]

    def prepare_time(self, timesteps: Tensor) -> Precomputed:
        """What each resnet block makes of these timesteps, (n,): a row for each, and a list of blocks per level."""
        time = self.time(timesteps)
        return Precomputed([[precompute(block, time) for block in level.resnets] for level in self.levels])

    def prepare_context(self, context: Tensor) -> Precomputed:
        """What each transformer makes of the context, (b, m, c), on its own: a list of them per level."""
        return Precomputed([[precompute(layer, context) for layer in level.transformers] for level in self.levels])

    @validated(inputs.check_unet_inputs)
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | Precomputed,
        encoder_hidden_states: Tensor | Precomputed,
        *unsupported: None,
        merge: Merge | None = None,
        return_dict: bool = True,
        **more: None,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict what `sample` (b, c, h, w) hides at `timestep` (one, or one per sample).

        `encoder_hidden_states`: (b, m, cross_attention_dim), m tokens that describe the picture; here m is 1. Of k b
        contexts, k for each sample in the samples' order k times over, the answer has as many samples. Either may
        come `Ready`, as a loop has them; `merge` joins the skips of this call. Of diffusers' further arguments
        `return_dict` alone can be other than None: `InputError`.
        """
        refuse_unsupported(unsupported, more)
        x, time, context = self.conv_in(sample), timestep, encoder_hidden_states
        merge = self.merge if merge is None else merge
        if not isinstance(time, Precomputed):
            time = self.prepare_time(torch.as_tensor(time, device=x.device).expand(len(x)))
        if not isinstance(context, Precomputed):
            context = self.prepare_context(context)
        told = list(zip(time.value, context.value, strict=True))  # level by level

        skips = [x]
        for level in self.down:
            x, more_skips = self.run(level, x, *told.pop(0))
            skips += more_skips
        x = self.run(self.mid, x, *told.pop(0))
        for i, level in enumerate(self.up):
            here = [repeat_to_batch(skips.pop(), x) for _ in range(self.config.layers_per_block + 1)]
            size = skips[-1].shape[2:] if skips else None  # odd sizes: the next skip tells what to grow to
            x = self.run(level, x, here, *told.pop(0), lambda h, skip, i=i: merge(h, skip, i), size)

        sample = self.conv_out(norm_silu(self.norm_out, x))
        return UNet2DConditionOutput(sample) if return_dict else (sample,)

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Merge skips as FreeU does (arXiv:2309.11497); for this model s1 0.9, s2 0.2, b1 1.2, b2 1.4 are usual."""
        self.merge = FreeU(s1, s2, b1, b2)

    def disable_freeu(self) -> None:
        """The usual merge, or a subclass's own."""
        vars(self).pop("merge", None)
        if not hasattr(type(self), "merge"):
            self.merge = concat_skip


def refuse_unsupported(unsupported: Sequence[Any], more: dict[str, Any]) -> None:
    """Arguments of the reference's UNet that no part of this pipeline has a use for."""
    given = {f"positional argument {i + 4}": value for i, value in enumerate(unsupported)} | more
    names = [name for name, value in given.items() if value is not None and value != {}]
    if names:
        raise InputError(f"UNet2DConditionModel: {', '.join(names)}: not supported; leave it out, or None")
