"""The networks, and the layers that a fork may replace."""

from .attention import Attention, CrossAttention, PixelAttention, SelfAttention, set_attend, sliced
from .clip import CLIPVisionConfig, CLIPVisionModelWithProjection
from .freeu import FreeU
from .layers import ResnetBlock, replace_layers
from .ops import sdpa
from .safety import CLIPConfig, StableDiffusionSafetyChecker
from .unet import UNet2DConditionModel
from .unet_blocks import Transformer, TransformerBlock, concat_skip
from .vae import AutoencoderKL

__all__ = [
    "Attention",
    "AutoencoderKL",
    "CLIPConfig",
    "CLIPVisionConfig",
    "CLIPVisionModelWithProjection",
    "CrossAttention",
    "FreeU",
    "PixelAttention",
    "ResnetBlock",
    "SelfAttention",
    "StableDiffusionSafetyChecker",
    "Transformer",
    "TransformerBlock",
    "UNet2DConditionModel",
    "concat_skip",
    "replace_layers",
    "sdpa",
    "set_attend",
    "sliced",
]
