"""The CLIP vision model: an image to one embedding (arXiv:2103.00020, a vision transformer as in arXiv:2010.11929)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from ..checks import MAX_SIDE, check_float, check_ints, validated
from ..config import Config, fixed, one_of
from ..errors import InputError, invalid
from ..outputs import BaseModelOutput, BaseModelOutputWithPooling, CLIPVisionModelOutput
from ..weights import key_tables
from ..weights.keymap import Keymap
from ..weights.pretrained import TransformersModel
from .attention import Attention, AttentionMixin
from .layers import GradientCheckpointingMixin, refuse_unsupported
from .ops import Linear, quick_gelu
from .validation import check_clip_inputs


class QuickGELU(nn.Module):
    """The approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, input: Tensor) -> Tensor:
        return quick_gelu(input)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


@dataclass(frozen=True, eq=False, repr=False)
class CLIPVisionConfig(Config):
    """`image_encoder/config.json`; also reads the vision tower's fields from a whole CLIP model's config."""

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
            expected = f"a multiple of num_attention_heads={self.num_attention_heads}"
            raise invalid(InputError, "hidden_size", expected, str(self.hidden_size))


class CLIPAttention(Attention):
    """Multi-head self-attention with CLIP's names for the projections."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__(config.num_attention_heads)
        width = config.hidden_size
        self.k_proj, self.v_proj, self.q_proj = (Linear(width, width) for _ in range(3))
        self.out_proj = Linear(width, width)

    def forward(self, hidden_states: Tensor, attention_mask: None = None, **more: Any) -> tuple[Tensor, None]:
        """(b, n, c) to the same shape, and None in place of the attention weights."""
        refuse_unsupported("CLIPAttention", attention_mask=attention_mask, **more)
        q, k, v = (self.split_heads(project(hidden_states)) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(self.attend_heads(q, k, v)), None


class CLIPMLP(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.activation_fn = ACTIVATIONS[config.hidden_act]()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class CLIPEncoderLayer(nn.Module):
    """Self-attention and an MLP, each with a norm before it and a residual."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, hidden_states: Tensor, attention_mask: None = None, **more: Any) -> Tensor:
        x = hidden_states + self.self_attn(self.layer_norm1(hidden_states), attention_mask=attention_mask, **more)[0]
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(GradientCheckpointingMixin, nn.Module):
    """The transformer layers."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self, inputs_embeds: Tensor, attention_mask: None = None, output_hidden_states: bool = False, **more: Any
    ) -> BaseModelOutput:
        """(b, n, c) to the same shape; on request also the input of every layer and the last output."""
        refuse_unsupported("CLIPEncoder", attention_mask=attention_mask, **more)
        x, states = inputs_embeds, ()
        for layer in self.layers:
            states += (x,) if output_hidden_states else ()
            x = self.maybe_checkpoint(layer, x)
        return BaseModelOutput(x, (*states, x) if output_hidden_states else None)


class CLIPVisionEmbeddings(nn.Module):
    """A class token and one token per patch, with learned positions."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(nn.init.normal_(torch.empty(width)).mul_(width**-0.5))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)
        nn.init.normal_(self.position_embedding.weight, std=config.initializer_range)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(b, 3, s, s) to (b, 1 + patches, c), the class token first."""
        refuse_unsupported("CLIPVisionEmbeddings", interpolate_pos_encoding=interpolate_pos_encoding or None)
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        patches = rearrange(patches, "b c h w -> b (h w) c")
        x = torch.cat([self.class_embedding.expand(patches.shape[0], 1, -1), patches], dim=1)
        return x + self.position_embedding(torch.arange(x.shape[1], device=x.device))


class CLIPVisionModel(nn.Module):
    """Patches and a class token through a transformer; the class token's output represents the image."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.image_size = config.image_size
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """(b, 3, s, s) to the last hidden state (b, 1 + patches, c) and the pooled output (b, c)."""
        x = self.pre_layrnorm(self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding))
        encoded = self.encoder(inputs_embeds=x, output_hidden_states=output_hidden_states)
        pooled = self.post_layernorm(encoded.last_hidden_state[:, 0])
        output = BaseModelOutputWithPooling(encoded.last_hidden_state, pooled, encoded.hidden_states)
        return output if return_dict else output.to_tuple()


class CLIPVisionModelWithProjection(AttentionMixin, TransformersModel, part="image_encoder", also=("CLIPModel",)):
    """The image encoder: an image to an embedding in the space that CLIP's images and texts share."""

    config_class = CLIPVisionConfig
    config: CLIPVisionConfig
    model_type = "clip_vision_model"
    main_input_name = "pixel_values"

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.vision_model = CLIPVisionModel(self.config)
        self.visual_projection = nn.Linear(self.config.hidden_size, self.config.projection_dim, bias=False)

    @classmethod
    def min_tensor_count(cls, config: CLIPVisionConfig) -> int:
        return config.num_hidden_layers

    @property
    def keymap(self) -> Keymap:
        return key_tables.image_encoder(self.config.num_hidden_layers)

    @validated(check_clip_inputs)
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool = False, return_dict: bool = True
    ) -> CLIPVisionModelOutput | tuple[Any, ...]:
        """Images (b, 3, s, s), normalised by CLIPImageProcessor, to `image_embeds` (b, projection_dim).

        The embeddings are not normalised. Raises `InputError` for images of another size than the config's.
        """
        encoded = self.vision_model(pixel_values=pixel_values, output_hidden_states=output_hidden_states)
        embeds = self.visual_projection(encoded.pooler_output)
        output = CLIPVisionModelOutput(embeds, encoded.last_hidden_state, encoded.hidden_states)
        return output if return_dict else output.to_tuple()

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.vision_model.encoder.gradient_checkpointing

    def gradient_checkpointing_enable(self) -> None:
        """Keep only the inputs of each layer; recompute its activations for the gradients."""
        self.vision_model.encoder.enable_gradient_checkpointing()

    def gradient_checkpointing_disable(self) -> None:
        self.vision_model.encoder.disable_gradient_checkpointing()
