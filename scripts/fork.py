"""A research fork in one file: custom kernels, layers, blocks, skips, inputs and schedulers on loaded weights.

    python scripts/fork.py CHECKPOINT

The package is not edited. Each function takes a pipeline and changes one thing; `main` applies all of them, generates
an image, saves the changed UNet and loads it again.
"""

from __future__ import annotations

import argparse
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from imvar import StableDiffusionImageVariationPipeline, UNet2DConditionModel, replace_layers, set_attend
from imvar.models import CrossAttention, ResnetBlock, SelfAttention
from imvar.models.unet_blocks import Transformer, TransformerBlock
from imvar.outputs import SchedulerOutput


class Tempered(nn.Module):
    """Attention kernel with a parameter: a learned temperature that is saved with the model."""

    def __init__(self, temperature: float = 1.0):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(temperature))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q / self.temperature, k, v)


class WindowAttention(SelfAttention):
    """Custom attention class: tokens attend only to their own half of the image."""

    @classmethod
    def from_layer(cls, layer: SelfAttention) -> WindowAttention:
        out = cls(layer.to_q.in_features, layer.heads, attend=layer.attend)
        out.load_state_dict(layer.state_dict())
        return out.to(layer.to_q.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(WindowAttention, self).forward(half) for half in x.chunk(2, dim=1)], dim=1)


class GatedBlock(ResnetBlock):
    """Residual block with an added gate, initialised to one so that the output is unchanged."""

    def __init__(self, *args: int, **options: float):
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.gate = nn.Parameter(torch.ones(self.conv1.out_channels, 1, 1))

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        return super().forward(x, temb) * self.gate


class GatedUNet(UNet2DConditionModel):
    block = GatedBlock


class MyUNet(GatedUNet):
    """UNet with gated blocks and tempered attention, whose `from_pretrained` loads their parameters."""

    def __init__(self, *args: object, **settings: object):
        super().__init__(*args, **settings)
        set_attend(self, Tempered())


class Euler:
    """Custom scheduler: any object with these five names (arXiv:2206.00364, algorithm 1, no churn)."""

    init_noise_sigma = 80.0

    def set_timesteps(self, num_inference_steps: int, device: object = None) -> None:
        sigmas = torch.linspace(80.0 ** (1 / 7), 0.1 ** (1 / 7), num_inference_steps) ** 7
        self.sigmas = torch.cat([sigmas, torch.zeros(1)])
        self.timesteps = torch.arange(num_inference_steps)

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample / (self.sigmas[timestep] ** 2 + 1) ** 0.5

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> SchedulerOutput:
        return SchedulerOutput(sample + (self.sigmas[timestep + 1] - self.sigmas[timestep]) * model_output)


class ConcatPipeline(StableDiffusionImageVariationPipeline):
    """Channels beside the latents, as in InstructPix2Pix and zero123: `pipe(photo, conditions={"pixels": z})`."""

    def unet_input(self, sample: Tensor, timestep: Tensor, *, pixels: Tensor) -> Tensor:
        return torch.cat([sample, pixels.to(sample).expand(len(sample), -1, -1, -1)], dim=1)


class PosePipeline(StableDiffusionImageVariationPipeline):
    """A second token from another encoder: `pipe(photo, conditions={"pose": angles})`, angles (1, 3)."""

    pose_encoder: nn.Module

    def __init__(self, *args: Any, pose_encoder: nn.Module, **components: Any):
        super().__init__(*args, **components)
        self.register_modules(pose_encoder=pose_encoder)

    def _encode_image(self, *args: Any, pose: Tensor, **options: Any) -> Tensor:
        context = super()._encode_image(*args, **options)
        token = self.pose_encoder(pose.to(context)).expand(len(context), 1, -1)
        return torch.cat([context, token], dim=1)


class ControlNetPipeline(StableDiffusionImageVariationPipeline):
    """Residuals of a ControlNet (arXiv:2302.05543): `pipe(photo, conditions={"control": edges})`."""

    def __init__(self, *args: Any, controlnet: Any, **components: Any):
        super().__init__(*args, **components)
        self.controlnet = controlnet

    def unet_kwargs(self, sample: Tensor, timestep: Tensor, context: Tensor, *, control: Tensor) -> dict[str, Any]:
        inputs = sample.repeat(len(context) // len(sample), 1, 1, 1), timestep, context
        down, mid = self.controlnet(*inputs, controlnet_cond=control.to(sample), return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


class ImagePromptAttention(CrossAttention):
    """A second key/value branch, as in IP-Adapter (arXiv:2308.06721), for the last `tokens` tokens of the context."""

    tokens, scale = 4, 1.0  # type: ignore[assignment]

    def __init__(self, dim: int, context_dim: int, heads: int, **options: Any):
        super().__init__(dim, context_dim, heads, **options)
        self.to_k_ip, self.to_v_ip = (nn.Linear(context_dim, dim, bias=False) for _ in range(2))
        nn.init.zeros_(self.to_v_ip.weight)  # changes nothing before training

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **options: Any) -> Tensor:  # type: ignore[override]
        context, image = encoder_hidden_states.tensor_split([-self.tokens], dim=1)
        q, k, v = self.project_qkv(hidden_states, context)
        k_ip, v_ip = self.split_heads(self.to_k_ip(image)), self.split_heads(self.to_v_ip(image))
        return self.project_out(self.attend_heads(q, k, v) + self.scale * self.attend_heads(q, k_ip, v_ip))


class RecordedAttention(CrossAttention):
    """Attention maps, as in DAAM (arXiv:2210.04885): `layer.maps` has one (b, h, n, m) for each call."""

    def attend_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        vars(self).setdefault("maps", []).append(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1))
        return super().attend_heads(q, k, v)


class ReferenceAttention(SelfAttention):
    """Self-attention that also attends to what the same layer of another UNet received in its last call."""

    source: ReferenceAttention | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:  # type: ignore[override]
        context = self.received = hidden_states
        if self.source is not None:
            context = torch.cat([hidden_states, self.source.received[:1].expand_as(hidden_states)], dim=1)
        return super().forward(hidden_states, context, **options)


def connect_reference(unet: nn.Module, reference: nn.Module) -> None:
    """Let `unet` attend to what `reference`, of the same architecture, received in its last call."""
    for model in (unet, reference):
        replace_layers(model, SelfAttention, ReferenceAttention.from_layer)
    for layer, other in zip(unet.modules(), reference.modules(), strict=True):
        if isinstance(layer, ReferenceAttention):
            vars(layer)["source"] = other  # not as a child module, which would be saved with this UNet


def train_lora(unet: Any, scheduler: Any, latents: Tensor, context: Tensor, steps: int = 2) -> dict[str, Tensor]:
    """Train an adapter by peft on latents (b, 4, h, w) and contexts (b, 1, c); return its weights.

    `pipe.save_lora_weights(folder, unet_lora_layers=...)` writes them for imvar and for diffusers.
    """
    from peft import LoraConfig, get_peft_model_state_dict

    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    optimizer = torch.optim.AdamW((p for p in unet.parameters() if p.requires_grad), lr=1e-3)
    for _ in range(steps):
        t, noise = torch.randint(1000, (len(latents),)), torch.randn_like(latents)
        is_velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, t) if is_velocity else noise
        loss = F.mse_loss(unet(scheduler.add_noise(latents, noise, t), t, context).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return get_peft_model_state_dict(unet)


class MotionTransformer(Transformer):
    """Attention over frames after the attention over pixels (arXiv:2307.04725); the batch is `frames` long.

    `UNet2DConditionModel.transformer` is the class that a UNet is built of; a zero output projection changes nothing.
    """

    def __init__(self, channels: int, context_dim: int, heads: int, **options: int):
        super().__init__(channels, context_dim, heads, **options)  # type: ignore[arg-type]
        self.motion = TransformerBlock(channels, channels, heads)
        self.motion_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.motion_out.weight)
        nn.init.zeros_(self.motion_out.bias)

    def forward(self, *args: Any, frames: int = 4, **options: Any) -> Tensor:  # type: ignore[override]
        x = super().forward(*args, **options)[0]
        tracks = rearrange(x, "(b f) c h w -> (b h w) f c", f=frames)
        moved = rearrange(
            self.motion_out(self.motion(tracks)), "(b h w) f c -> (b f) c h w", h=x.shape[2], w=x.shape[3]
        )
        return x + moved


class MotionUNet(UNet2DConditionModel):
    transformer = MotionTransformer


class TinyDecoder(nn.Module):
    """Another VAE: any object with `config` and `decode`. This one maps each latent to a square of one colour."""

    def __init__(self, factor: int = 8):
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=1.0, block_out_channels=(1,) * factor.bit_length())
        self.colors, self.factor = nn.Conv2d(4, 3, 1), factor

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (F.interpolate(self.colors(z), scale_factor=self.factor).tanh(),)


def tempered_attention(pipe: StableDiffusionImageVariationPipeline) -> None:
    set_attend(pipe.unet, Tempered(0.9))


def windowed_attention(pipe: StableDiffusionImageVariationPipeline) -> None:
    replace_layers(pipe.unet, SelfAttention, WindowAttention.from_layer)


def gated_blocks(pipe: StableDiffusionImageVariationPipeline) -> None:
    """Rebuild the UNet with the new block and load the old weights into it."""
    unet = GatedUNet.from_config(pipe.unet.config).to(pipe.device, pipe.dtype)
    unet.load_state_dict(unet.state_dict() | pipe.unet.state_dict())
    pipe.unet = unet.eval()


def quieter_skips(pipe: StableDiffusionImageVariationPipeline) -> None:
    pipe.unet.merge = lambda h, skip, level: torch.cat([h, skip * 0.9], dim=1)


def wider_input(pipe: StableDiffusionImageVariationPipeline, extra: int = 5) -> None:
    """Add input channels with zero weights, so that the output does not change before training."""
    old = pipe.unet.conv_in
    new = nn.Conv2d(old.in_channels + extra, old.out_channels, 3, padding=1).to(old.weight)
    with torch.no_grad():
        new.weight.zero_()[:, : old.in_channels] = old.weight
        new.bias.copy_(old.bias)  # type: ignore[union-attr, arg-type]
    pipe.unet.conv_in = new
    pipe.unet.register_to_config(in_channels=new.in_channels)


def custom_scheduler(pipe: StableDiffusionImageVariationPipeline) -> None:
    pipe.scheduler = Euler()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    pipe = StableDiffusionImageVariationPipeline.from_pretrained(parser.parse_args().checkpoint)
    for change in (gated_blocks, tempered_attention, windowed_attention, quieter_skips, custom_scheduler):
        change(pipe)
        print(f"{change.__name__}: done")
    image = Image.effect_mandelbrot((256, 256), (-2, -1.5, 1, 1.5), 100).convert("RGB")
    print(pipe(image, num_inference_steps=3, output_type="pt").images.shape)

    with tempfile.TemporaryDirectory() as folder:
        pipe.unet.save_pretrained(folder)
        reloaded = MyUNet.from_pretrained(folder)
    same = all(torch.equal(reloaded.state_dict()[name], tensor) for name, tensor in pipe.unet.state_dict().items())
    print(f"the changed UNet saved and loaded again: {'equal' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
