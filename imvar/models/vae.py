"""The variational autoencoder: images to a Gaussian over latents of an eighth of their size, and latents to images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_block_channels, check_float, check_image_size, check_ints, check_type, validated
from ..config import Config, fixed, one_of
from ..errors import InputError, invalid, short_repr
from ..noise import Generators, randn
from ..outputs import AutoencoderKLOutput, DecoderOutput
from ..weights import key_tables
from ..weights.keymap import Keymap
from ..weights.pretrained import PretrainedModel
from .attention import AttentionMixin, PixelAttention
from .layers import Downsample, GradientCheckpointingMixin, ResnetBlock, Upsample, refuse_unsupported
from .ops import Conv2d, GroupNorm, norm_act, packing
from .validation import check_decode_inputs, check_encode_inputs, check_tiling

NORM_EPS = 1e-6


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
        n_blocks = len(self.block_out_channels)
        for name, kind in ("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D"):
            if list(getattr(self, name)) != [kind] * n_blocks:
                expected = f"{n_blocks} times {kind}, once per entry of block_out_channels"
                raise invalid(InputError, name, expected, short_repr(list(getattr(self, name))))
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                expected = f"multiples of norm_num_groups={self.norm_num_groups}"
                raise invalid(InputError, "block_out_channels", expected, str(channels))


def resnet(in_channels: int, out_channels: int, config: VAEConfig) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, groups=config.norm_num_groups, eps=NORM_EPS)


class EncoderBlock(nn.Module):
    """Resnet blocks, then downsampling, except in the last block."""

    def __init__(self, resnets: list[ResnetBlock], downsample: nn.Module | None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = None if downsample is None else nn.ModuleList([downsample])

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.resnets:
            hidden_states = block(hidden_states)
        return hidden_states if self.downsamplers is None else self.downsamplers[0](hidden_states)


class DecoderBlock(nn.Module):
    """Resnet blocks, then upsampling, except in the last block."""

    def __init__(self, resnets: list[ResnetBlock], upsample: nn.Module | None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.upsamplers = None if upsample is None else nn.ModuleList([upsample])

    def forward(self, hidden_states: Tensor, temb: None = None) -> Tensor:
        refuse_unsupported("DecoderBlock", temb=temb)
        for block in self.resnets:
            hidden_states = block(hidden_states)
        return hidden_states if self.upsamplers is None else self.upsamplers[0](hidden_states)


class VAEMidBlock(nn.Module):
    """Attention over all pixels between two resnet blocks."""

    def __init__(self, channels: int, config: VAEConfig):
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(channels, groups=config.norm_num_groups, eps=NORM_EPS)])
        self.resnets = nn.ModuleList(resnet(channels, channels, config) for _ in range(2))

    def forward(self, hidden_states: Tensor, temb: None = None) -> Tensor:
        refuse_unsupported("VAEMidBlock", temb=temb)
        return self.resnets[1](self.attentions[0](self.resnets[0](hidden_states)))


class Encoder(GradientCheckpointingMixin, nn.Module):
    """Images (b, 3, h, w) to the moments of the latents (b, 2 c, h/8, w/8)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks, before = nn.ModuleList(), widths[0]
        for width in widths:
            resnets = [resnet(width if j else before, width, config) for j in range(config.layers_per_block)]
            last = len(self.down_blocks) == len(widths) - 1
            self.down_blocks.append(EncoderBlock(resnets, None if last else Downsample(width, one_sided=True)))
            before = width
        self.mid_block = VAEMidBlock(widths[-1], config)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], NORM_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        x = self.conv_in(sample)
        for block in self.down_blocks:
            x = self.maybe_checkpoint(block, x)
        x = self.maybe_checkpoint(self.mid_block, x)
        return self.conv_out(norm_act(self.conv_norm_out, self.conv_act, x))


class Decoder(GradientCheckpointingMixin, nn.Module):
    """Latents (b, c, h, w) to images (b, 3, 8h, 8w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = list(reversed(config.block_out_channels))
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.up_blocks, before = nn.ModuleList(), widths[0]  # in the published order, before mid_block
        for width in widths:
            resnets = [resnet(width if j else before, width, config) for j in range(config.layers_per_block + 1)]
            last = len(self.up_blocks) == len(widths) - 1
            self.up_blocks.append(DecoderBlock(resnets, None if last else Upsample(width)))
            before = width
        self.mid_block = VAEMidBlock(widths[0], config)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], NORM_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, sample: Tensor, latent_embeds: None = None) -> Tensor:
        refuse_unsupported("Decoder", latent_embeds=latent_embeds)
        x = self.maybe_checkpoint(self.mid_block, self.conv_in(sample))
        for block in self.up_blocks:
            x = self.maybe_checkpoint(block, x)
        return self.conv_out(norm_act(self.conv_norm_out, self.conv_act, x))


class DiagonalGaussianDistribution:
    """Diagonal Gaussian posterior over the latents: mean and log-variance per element (arXiv:1312.6114).

    `parameters`: (b, 2c, h, w), means first; log-variances are clamped to [-30, 20].
    """

    def __init__(self, parameters: Tensor):
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)

    def sample(self, generator: Generators | None = None) -> Tensor:
        """Draw a sample (b, c, h, w); the noise is drawn on the generator's device."""
        return self.mean + self.std * randn(self.mean.shape, generator, dtype=self.mean.dtype, device=self.mean.device)

    def mode(self) -> Tensor:
        """Return the mean."""
        return self.mean

    def nll(self, sample: Tensor) -> Tensor:
        """Return the negative log-likelihood of a sample (b, c, h, w), in nats: (b,)."""
        terms = math.log(2 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.sum(dim=(1, 2, 3))

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Return the KL divergence from `other`, by default a standard normal, in nats: (b,)."""
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            terms = ((self.mean - other.mean) ** 2 + self.var) / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))


class AutoencoderKL(AttentionMixin, GradientCheckpointingMixin, PretrainedModel, part="vae"):
    """Compresses images to latents, and decodes latents to images (arXiv:2112.10752, section 3.1)."""

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
        return key_tables.vae(len(self.config.block_out_channels), self.config.layers_per_block)

    @validated(check_encode_inputs)
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Images (b, 3, h, w) in [-1, 1] to a Gaussian over unscaled latents (b, 4, h/8, w/8)."""
        moments = self._sliced(self._encode, x)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    @validated(check_decode_inputs)
    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> DecoderOutput | tuple[Tensor]:
        """Latents (b, 4, h, w), already divided by `scaling_factor`, to images (b, 3, 8h, 8w) around [-1, 1].

        `generator` is accepted for code written against diffusers; decoding draws nothing.
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
        """Encode images and decode the mode of their latents, or a sample of them."""
        posterior = self.encode(sample, return_dict=False)[0]
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode(), return_dict)

    @validated(check_encode_inputs)
    def tiled_encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encode as `encode` does after `enable_tiling`, images of any size in tiles."""
        check_tiling(self, max(x.shape[2:]), "tile_sample_min_size", "tile_latent_min_size")
        posterior = DiagonalGaussianDistribution(self._sliced(self._tiled_encode, x))
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    @validated(check_decode_inputs)
    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode as `decode` does after `enable_tiling`, latents of any size in tiles."""
        check_tiling(self, max(z.shape[2:]), "tile_latent_min_size", "tile_sample_min_size")
        sample = self._sliced(self._tiled_decode, z)
        return DecoderOutput(sample) if return_dict else (sample,)

    def _encode(self, x: Tensor) -> Tensor:
        tiles = self.use_tiling and max(x.shape[2:]) > self.tile_sample_min_size
        return self._tiled_encode(x) if tiles else self._encode_tile(x)

    def _decode(self, z: Tensor) -> Tensor:
        tiles = self.use_tiling and max(z.shape[2:]) > self.tile_latent_min_size
        return self._tiled_decode(z) if tiles else self._decode_tile(z)

    def _tiled_encode(self, x: Tensor) -> Tensor:
        return self._tiled(self._encode_tile, x, self.tile_sample_min_size, self.tile_latent_min_size)

    def _tiled_decode(self, z: Tensor) -> Tensor:
        return self._tiled(self._decode_tile, z, self.tile_latent_min_size, self.tile_sample_min_size)

    def _tiled(self, function: Callable[[Tensor], Tensor], x: Tensor, size: int, out_size: int) -> Tensor:
        rows, columns = tile_origins(x, size, self.tile_overlap_factor)
        with packing(self, calls=len(rows) * len(columns)):
            return tiled(function, x, size, out_size, self.tile_overlap_factor)

    def _encode_tile(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def _decode_tile(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def _sliced(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        slices = x.split(1) if self.use_slicing else [x]
        with packing(self, calls=len(slices)):
            outputs = [function(part).contiguous() for part in slices]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def enable_slicing(self) -> None:
        """Encode and decode a batch one image at a time: exact, with a lower memory peak."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Encode and decode large images in overlapping tiles, blended: approximate, with the memory of one tile."""
        self.use_tiling = bool(check_type("use_tiling", use_tiling, bool))

    def disable_tiling(self) -> None:
        self.use_tiling = False


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, size: int, out_size: int, overlap: float) -> Tensor:
    """Apply `function` to tiles of x (b, c, h, w) and blend their overlaps linearly.

    Tiles are `size` wide and become `out_size` wide; neighbours share a fraction `overlap` of their width.
    """
    fade = int(out_size * overlap)
    keep = out_size - fade
    tops, lefts = tile_origins(x, size, overlap)
    rows: list[list[Tensor]] = []
    for top in tops:
        row: list[Tensor] = []
        for left in lefts:
            tile = function(x[:, :, top : top + size, left : left + size])
            if rows:
                tile = blend_edge(rows[-1][len(row)], tile, fade, dim=2)
            if row:
                tile = blend_edge(row[-1], tile, fade, dim=3)
            row.append(tile)
        rows.append(row)
    return torch.cat([torch.cat([tile[:, :, :keep, :keep] for tile in row], dim=3) for row in rows], dim=2)


def tile_origins(x: Tensor, size: int, overlap: float) -> tuple[range, range]:
    """Return the first row and the first column of each tile of x (b, c, h, w)."""
    stride = int(size * (1 - overlap))
    return range(0, x.shape[2], stride), range(0, x.shape[3], stride)


def blend_edge(before: Tensor, tile: Tensor, fade: int, dim: int) -> Tensor:
    """Return `tile` with its first `fade` rows (dim 2) or columns (dim 3) blended with the last ones of `before`."""
    fade = min(fade, before.shape[dim], tile.shape[dim])
    if fade == 0:
        return tile
    weight = (torch.arange(fade, device=tile.device) / fade).to(tile.dtype)
    weight = weight[:, None] if dim == 2 else weight
    edge, rest = tile.tensor_split([fade], dim)
    return torch.cat([before.narrow(dim, before.shape[dim] - fade, fade) * (1 - weight) + edge * weight, rest], dim)
