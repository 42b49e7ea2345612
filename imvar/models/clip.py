"""The CLIP vision tower: a picture to one embedding (arXiv:2103.00020, on arXiv:2010.11929)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..checks import MAX_SIDE, check_float, check_ints, validated
from ..config import Config, fixed, one_of
from ..errors import InputError
from ..outputs import CLIPVisionModelOutput
from ..weights import key_tables as tables
from ..weights.keymap import Keymap
from ..weights.pretrained import TransformersModel
from . import validation as inputs
from .attention import AttentionMixin, SelfAttention
from .layers import GradientCheckpointingMixin, Linear


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation x * sigmoid(1.702 x) that OpenAI's CLIP was trained with (arXiv:1606.08415)."""
    if torch.is_grad_enabled():
        return x * torch.sigmoid(1.702 * x)
    return (1.702 * x).sigmoid_().mul_(x)  # the same in one place, rather than in three


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True, eq=False, repr=False)
class CLIPVisionConfig(Config):
    """`image_encoder/config.json`; also reads the vision part out of a whole CLIP model's config."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = one_of("quick_gelu", "gelu")
    layer_norm_eps: float = 1e-5
    attention_dropout: float = fixed(0.0)
    initializer_range: float = 0.02
    initializer_factor: float = 1.0

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], **changes: Any) -> Self:
        if isinstance(vision := settings.get("vision_config"), Mapping):
            settings = {**vision, **{k: v for k, v in settings.items() if k == "projection_dim"}}
        return super().from_dict(settings, **changes)

    def check(self) -> None:
        super().check()
        check_ints(
            self,
            "hidden_size",
            "intermediate_size",
            "projection_dim",
            "num_hidden_layers",
            "num_attention_heads",
            "num_channels",
        )
        check_ints(self, "image_size", high=MAX_SIDE)
        check_ints(self, "patch_size", high=self.image_size)
        check_float("layer_norm_eps", self.layer_norm_eps)
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size={self.hidden_size} cannot be split into num_attention_heads={self.num_attention_heads}",
                key="hidden_size",
            )


class MLP(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.widen = Linear(config.hidden_size, config.intermediate_size)
        self.act = ACTIVATIONS[config.hidden_act]
        self.narrow = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.act(self.widen(self.norm(x))))


class Layer(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.attn = SelfAttention(config.hidden_size, config.num_attention_heads, eps=config.layer_norm_eps, bias=True)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class VisionTower(GradientCheckpointingMixin, nn.Module):
    """Patches and one class token through a transformer; the class token's answer is the picture's."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.image_size, width = config.image_size, config.hidden_size
        self.patch = nn.Conv2d(config.num_channels, width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_token = nn.Parameter(torch.randn(width) * width**-0.5)
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.positions = nn.Parameter(torch.randn(tokens, width) * config.initializer_range)
        self.norm_in = nn.LayerNorm(width, config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm_out = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, pixels: Tensor, states: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """pixels: b 3 s s. Answers the pooled b c and the last b n c; `states` collects all of the latter."""
        patches = rearrange(self.patch(pixels.to(self.patch.weight.dtype)), "b c h w -> b (h w) c")
        x = torch.cat([self.class_token.expand(len(patches), 1, -1), patches], dim=1)
        x = self.norm_in(x + self.positions)
        for layer in self.layers:
            if states is not None:
                states.append(x)
            x = self.run(layer, x)
        return self.norm_out(x[:, 0]), x


class CLIPVisionModelWithProjection(AttentionMixin, TransformersModel, part="image_encoder", also=("CLIPModel",)):
    """The image encoder: picture to embedding, in the space that pictures and texts share."""

    config_class = CLIPVisionConfig
    config: CLIPVisionConfig
    model_type = "clip_vision_model"
    main_input_name = "pixel_values"

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.tower = VisionTower(self.config)
        self.proj = nn.Linear(self.config.hidden_size, self.config.projection_dim, bias=False)

    @classmethod
    def min_tensor_count(cls, config: CLIPVisionConfig) -> int:
        return config.num_hidden_layers

    @property
    def keymap(self) -> Keymap:
        return tables.image_encoder(self.config.num_hidden_layers)

    @validated(inputs.check_clip_inputs)
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool = False, return_dict: bool = True
    ) -> CLIPVisionModelOutput | tuple[Any, ...]:
        """Pictures (b, 3, s, s), normalised by CLIPImageProcessor, to `image_embeds` (b, projection_dim).

        The embeddings are not normalised. Raises `InputError` for pictures of another size than the config's.
        """
        states: list[Tensor] | None = [] if output_hidden_states else None
        pooled, last = self.tower(pixel_values, states)
        output = CLIPVisionModelOutput(self.proj(pooled), last, None if states is None else (*states, last))
        return output if return_dict else output.to_tuple()

    def gradient_checkpointing_enable(self) -> None:
        """Keep only the inputs of each layer; its insides are computed again for the gradients."""
        self.tower.enable_gradient_checkpointing()

    def gradient_checkpointing_disable(self) -> None:
        self.tower.disable_gradient_checkpointing()
