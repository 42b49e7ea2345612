"""The autoencoder: pictures to a Gaussian over latents an eighth the size, and latents to pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_block_channels, check_float, check_image_size, check_ints, check_type, validated
from ..config import Config, fixed, one_of
from ..errors import InputError, short_repr
from ..kernels.packed_weights import packing
from ..noise import Generators, randn
from ..outputs import AutoencoderKLOutput, DecoderOutput
from ..weights import key_tables as tables
from ..weights.keymap import Keymap
from ..weights.pretrained import PretrainedModel
from . import validation as inputs
from .attention import AttentionMixin, PixelAttention
from .layers import Conv2d, Downsample, GradientCheckpointingMixin, GroupNorm, ResnetBlock, Upsample, norm_silu

EPS = 1e-6  # of every norm in here


@dataclass(frozen=True, eq=False, repr=False)
class VAEConfig(Config):
    """`vae/config.json`."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: Sequence[str] = ("DownEncoderBlock2D",)
    up_block_types: Sequence[str] = ("UpDecoderBlock2D",)
    block_out_channels: Sequence[int] = (64,)
    layers_per_block: int = 1
    act_fn: str = one_of("silu", "swish")
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | Sequence[int] = 32
    scaling_factor: float = 0.18215
    shift_factor: None = fixed(None)
    latents_mean: None = fixed(None)
    latents_std: None = fixed(None)
    force_upcast: bool = True
    use_quant_conv: bool = fixed(True)
    use_post_quant_conv: bool = fixed(True)
    mid_block_add_attention: bool = fixed(True)

    def check(self) -> None:
        super().check()
        check_ints(self, "in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
        check_block_channels(self)
        check_image_size("sample_size", self.sample_size)
        check_float("scaling_factor", self.scaling_factor, low=1e-6, high=1e6)
        number = len(self.block_out_channels)
        for name, kind in ("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D"):
            if list(getattr(self, name)) != [kind] * number:
                raise InputError(
                    f"{name}={short_repr(list(getattr(self, name)))}: {number} times {kind} would do, once per "
                    f"entry of block_out_channels={list(self.block_out_channels)}",
                    key=name,
                )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise InputError(
                    f"block_out_channels: {channels} cannot be split into {self.norm_num_groups} groups",
                    key="block_out_channels",
                )


def resnet(in_channels: int, out_channels: int, config: VAEConfig) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, groups=config.norm_num_groups, eps=EPS)


class VAEBlock(nn.Module):
    """Resnet blocks, then a change of size at all levels but the last."""

    def __init__(self, resnets: list[ResnetBlock], resample: nn.Module | None):
        super().__init__()
        self.resnets, self.resample = nn.ModuleList(resnets), resample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x if self.resample is None else self.resample(x)


class VAEMidBlock(nn.Module):
    """A resnet block on either side of attention over all pixels."""

    def __init__(self, channels: int, config: VAEConfig):
        super().__init__()
        self.resnet1 = resnet(channels, channels, config)
        self.attention = PixelAttention(channels, groups=config.norm_num_groups, eps=EPS)
        self.resnet2 = resnet(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.resnet2(self.attention(self.resnet1(x)))


class Encoder(GradientCheckpointingMixin, nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down, before = nn.ModuleList(), widths[0]
        for width in widths:
            resnets = [resnet(width if i else before, width, config) for i in range(config.layers_per_block)]
            last = len(self.down) == len(widths) - 1
            self.down.append(VAEBlock(resnets, None if last else Downsample(width, one_sided=True)))
            before = width
        self.mid = VAEMidBlock(widths[-1], config)
        self.norm_out = GroupNorm(config.norm_num_groups, widths[-1], EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = self.run(level, x)
        x = self.run(self.mid, x)
        return self.conv_out(norm_silu(self.norm_out, x))


class Decoder(GradientCheckpointingMixin, nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = list(reversed(config.block_out_channels))
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = VAEMidBlock(widths[0], config)
        self.up, before = nn.ModuleList(), widths[0]
        for width in widths:
            resnets = [resnet(width if i else before, width, config) for i in range(config.layers_per_block + 1)]
            last = len(self.up) == len(widths) - 1
            self.up.append(VAEBlock(resnets, None if last else Upsample(width)))
            before = width
        self.norm_out = GroupNorm(config.norm_num_groups, widths[-1], EPS)
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.run(self.mid, self.conv_in(z))
        for level in self.up:
            x = self.run(level, x)
        return self.conv_out(norm_silu(self.norm_out, x))


class DiagonalGaussianDistribution:
    """What the encoder knows of the latents: a mean and a log variance each (arXiv:1312.6114).

    `parameters`: (b, 2c, h, w), means first; log variances are kept within [-30, 20].
    """

    def __init__(self, parameters: Tensor):
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)

    def sample(self, generator: Generators | None = None) -> Tensor:
        """A draw, (b, c, h, w); the noise is drawn on the generator's device."""
        return self.mean + self.std * randn(self.mean.shape, generator, dtype=self.mean.dtype, device=self.mean.device)

    def mode(self) -> Tensor:
        return self.mean

    def nll(self, sample: Tensor) -> Tensor:
        """Negative log likelihood of a sample (b, c, h, w), in nats: (b,)."""
        terms = math.log(2 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.sum(dim=(1, 2, 3))

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL divergence from `other`, by default a standard normal, in nats: (b,)."""
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            terms = ((self.mean - other.mean) ** 2 + self.var) / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))


class AutoencoderKL(AttentionMixin, GradientCheckpointingMixin, PretrainedModel, part="vae"):
    """Compress pictures to latents and back (arXiv:2112.10752, section 3.1)."""

    config_class = VAEConfig
    config: VAEConfig

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        config, channels = self.config, self.config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = Conv2d(channels, channels, 1)

        size = config.sample_size
        self.use_slicing = self.use_tiling = False
        self.tile_sample_min_size = size if isinstance(size, int) else size[0]
        self.tile_latent_min_size = int(self.tile_sample_min_size / 2 ** (len(config.block_out_channels) - 1))
        self.tile_overlap_factor = 0.25

    @classmethod
    def min_tensor_count(cls, config: VAEConfig) -> int:
        return (2 * config.layers_per_block + 1) * len(config.block_out_channels)

    @property
    def keymap(self) -> Keymap:
        return tables.vae(len(self.config.block_out_channels), self.config.layers_per_block)

    @validated(inputs.check_encode_inputs)
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Pictures (b, 3, h, w) with values in [-1, 1] to a Gaussian over (b, 4, h/8, w/8), unscaled."""
        moments = self._sliced(self._encode, x)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    @validated(inputs.check_decode_inputs)
    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> DecoderOutput | tuple[Tensor]:
        """Latents (b, 4, h, w), already divided by `scaling_factor`, to pictures (b, 3, 8h, 8w) around [-1, 1].

        `generator` is there for code written against diffusers; decoding draws nothing.
        """
        sample = self._sliced(self._decode, z)
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generators | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """There and back: the mode of the latents, or a draw from them, decoded."""
        posterior = self.encode(sample, return_dict=False)[0]
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode(), return_dict)

    def _encode(self, x: Tensor) -> Tensor:
        def encode(tile: Tensor) -> Tensor:
            return self.quant_conv(self.encoder(tile))

        if self.use_tiling and max(x.shape[2:]) > self.tile_sample_min_size:
            return tiled(encode, x, self.tile_sample_min_size, self.tile_latent_min_size, self.tile_overlap_factor)
        return encode(x)

    def _decode(self, z: Tensor) -> Tensor:
        def decode(tile: Tensor) -> Tensor:
            return self.decoder(self.post_quant_conv(tile))

        if self.use_tiling and max(z.shape[2:]) > self.tile_latent_min_size:
            return tiled(decode, z, self.tile_latent_min_size, self.tile_sample_min_size, self.tile_overlap_factor)
        return decode(z)

    def _sliced(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        parts = x.split(1) if self.use_slicing else [x]
        with packing(self, calls=len(parts)):
            made = [run(part).contiguous() for part in parts]
        return made[0] if len(made) == 1 else torch.cat(made)

    def enable_slicing(self) -> None:
        """Encode and decode a batch one picture at a time: exact, and less memory at once."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Encode and decode large pictures in overlapping tiles, blended: approximate, memory of one tile."""
        self.use_tiling = bool(check_type("use_tiling", use_tiling, bool))

    def disable_tiling(self) -> None:
        self.use_tiling = False

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the inputs of each level; their insides are computed again for the gradients."""
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = False


def tiled(run: Callable[[Tensor], Tensor], x: Tensor, size: int, out_size: int, overlap: float) -> Tensor:
    """`run` over tiles of `size` that overlap by a share of `overlap`, faded into each other.

    x: b c h w; a tile of `size` becomes one of `out_size`.
    """
    stride, fade = int(size * (1 - overlap)), int(out_size * overlap)
    keep = out_size - fade
    rows: list[list[Tensor]] = []
    for top in range(0, x.shape[2], stride):
        row: list[Tensor] = []
        for left in range(0, x.shape[3], stride):
            tile = run(x[:, :, top : top + size, left : left + size])
            if rows:
                tile = blend_edge(rows[-1][len(row)], tile, fade, dim=2)
            if row:
                tile = blend_edge(row[-1], tile, fade, dim=3)
            row.append(tile)
        rows.append(row)
    return torch.cat([torch.cat([tile[:, :, :keep, :keep] for tile in row], dim=3) for row in rows], dim=2)


def blend_edge(before: Tensor, tile: Tensor, fade: int, dim: int) -> Tensor:
    """`tile` with its first `fade` rows (dim 2) or columns (dim 3) turning gradually from `before`'s last."""
    fade = min(fade, before.shape[dim], tile.shape[dim])
    if fade == 0:
        return tile
    weight = (torch.arange(fade, device=tile.device) / fade).to(tile.dtype)
    weight = weight[:, None] if dim == 2 else weight
    start, rest = tile.tensor_split([fade], dim)
    return torch.cat([before.narrow(dim, before.shape[dim] - fade, fade) * (1 - weight) + start * weight, rest], dim)
