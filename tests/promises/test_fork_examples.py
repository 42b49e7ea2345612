"""The examples of scripts/fork.py that docs/forking.md explains, on the bundled checkpoint."""

import copy
import re
from pathlib import Path

import diffusers
import pytest
import torch
from fork import (
    ConcatPipeline,
    ControlNetPipeline,
    ImagePromptAttention,
    MotionUNet,
    PosePipeline,
    RecordedAttention,
    TinyDecoder,
    connect_reference,
    train_lora,
    wider_input,
)

import imvar
from imvar import StableDiffusionImageVariationPipeline, replace_layers
from imvar.models import CrossAttention

ROOT = Path(__file__).parents[2]

ATOL = 1e-5


@pytest.fixture
def emoji():
    return quiet(StableDiffusionImageVariationPipeline.from_pretrained("imvar-emoji"))


@pytest.fixture(scope="module")
def drawing():
    return imvar.load_image(next(iter(imvar.bundled_examples("imvar-emoji").values())))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, photo, **options):
    return pipe(photo, **({"num_inference_steps": 2, "output_type": "pt", "seed": 0} | options)).images


def close(a, b):
    return torch.allclose(a, b, atol=ATOL)


def test_channels_beside_the_latents_change_nothing_before_training(emoji, drawing):
    before = run(emoji, drawing)
    size = emoji.unet.config.sample_size
    pixels = torch.randn(1, 5, size, size)
    wider_input(emoji)
    wide = quiet(ConcatPipeline(**emoji.components))
    assert close(run(wide, drawing, conditions={"pixels": pixels}), before)
    with torch.no_grad():
        wide.unet.conv_in.weight[:, 4:].normal_(std=0.1)
    assert not close(run(wide, drawing, conditions={"pixels": pixels}), before)


def test_a_pose_token_changes_the_image(emoji, drawing):
    width = emoji.unet.config.cross_attention_dim
    pose = quiet(PosePipeline(**emoji.components, pose_encoder=torch.nn.Linear(3, width)))
    one, other = (run(pose, drawing, conditions={"pose": torch.tensor([[0.0, 0.0, angle]])}) for angle in (0.0, 9.0))
    assert not close(one, other)
    with pytest.raises(imvar.InputError, match="conditions: expected the names 'pose'"):
        run(pose, drawing)


@torch.no_grad()
def test_a_motion_module_changes_nothing_at_first_and_mixes_frames_then(emoji, drawing, tmp_path):
    before = run(emoji, drawing, num_images_per_prompt=4)
    unet = MotionUNet.from_config(emoji.unet.config)
    unet.load_state_dict(unet.state_dict() | emoji.unet.state_dict())
    video = quiet(StableDiffusionImageVariationPipeline(**(emoji.components | {"unet": unet.eval()})))
    assert close(run(video, drawing, num_images_per_prompt=4), before)
    unet.mid_block.attentions[0].motion_out.weight.normal_(std=0.1)
    noise = torch.randn(4, 4, emoji.unet.config.sample_size, emoji.unet.config.sample_size)
    other = noise.clone()
    other[0] *= -1
    after, changed = (run(video, drawing, num_images_per_prompt=4, latents=x, seed=None) for x in (noise, other))
    assert not close(after[1:], changed[1:])  # frames see each other
    unet.save_pretrained(tmp_path)
    assert close(MotionUNet.from_pretrained(tmp_path).mid_block.attentions[0].motion_out.weight,
                 unet.mid_block.attentions[0].motion_out.weight)  # fmt: skip


def test_another_vae(emoji, drawing):
    tiny = quiet(StableDiffusionImageVariationPipeline(**(emoji.components | {"vae": TinyDecoder(4)})))
    images = run(tiny, drawing)
    assert images.shape == run(emoji, drawing).shape
    assert torch.equal(images[:, :, ::4, ::4], images[:, :, 1::4, 3::4])


def test_the_tiny_vae_of_diffusers(emoji, drawing):
    vae = diffusers.AutoencoderTiny().eval()
    tiny = quiet(StableDiffusionImageVariationPipeline(**(emoji.components | {"vae": vae})))
    with torch.no_grad():
        expected = vae.decode(run(tiny, drawing, output_type="latent") / vae.config.scaling_factor).sample
    assert close(run(tiny, drawing), (expected / 2 + 0.5).clamp(0, 1))


def test_the_code_of_the_page_is_that_of_the_script():
    code, page = (ROOT / "scripts/fork.py").read_text(), (ROOT / "docs/forking.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) > 10
    assert [block for block in blocks if block not in code] == []


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.5)])
@torch.no_grad()
def test_controlnet_equals_diffusers(emoji, drawing, interval):
    controlnet = diffusers.ControlNetModel.from_unet(emoji.unet).eval()
    size = 8 * emoji.unet.config.sample_size
    control = torch.rand(1, 3, size, size)
    controlled = quiet(ControlNetPipeline(**emoji.components, controlnet=controlnet))
    options = {"conditions": {"control": control}, "guidance_interval": interval}
    assert close(run(controlled, drawing, **options), run(emoji, drawing, guidance_interval=interval))
    for name, weight in controlnet.named_parameters():
        if "controlnet_" in name:
            weight.normal_(std=0.05)
    made = run(controlled, drawing, **options)
    assert not close(made, run(emoji, drawing, guidance_interval=interval))
    cached = run(controlled, drawing, **options, cache_interval=2)
    assert cached.isfinite().all()
    assert not close(cached, run(emoji, drawing, guidance_interval=interval, cache_interval=2))
    reference = diffusers.UNet2DConditionModel.from_config(dict(emoji.unet.config)).eval()
    reference.load_state_dict(emoji.unet.state_dict())
    twin = quiet(ControlNetPipeline(**(emoji.components | {"unet": reference}), controlnet=controlnet))
    assert close(made, run(twin, drawing, **options))


@torch.no_grad()
def test_a_second_branch_changes_nothing_before_training_and_is_saved(emoji, tmp_path):
    width, size = emoji.unet.config.cross_attention_dim, emoji.unet.config.sample_size
    x, context, prompt = torch.randn(1, 4, size, size), torch.randn(1, 1, width), torch.randn(1, 4, width)
    unet = copy.deepcopy(emoji.unet)
    replace_layers(unet, CrossAttention, ImagePromptAttention.from_layer)
    expected = emoji.unet(x, 5, context).sample
    assert close(unet(x, 5, torch.cat([context, prompt], dim=1)).sample, expected)
    for layer in unet.modules():
        if isinstance(layer, ImagePromptAttention):
            layer.to_v_ip.weight.normal_(std=0.1)
    changed = unet(x, 5, torch.cat([context, prompt], dim=1)).sample
    assert not close(changed, expected)
    unet.set_attention_slice("max")
    assert close(unet(x, 5, torch.cat([context, prompt], dim=1)).sample, changed)
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.to_k_ip.weight" in unet.state_dict()


@torch.no_grad()
def test_attention_maps_are_recorded(emoji):
    width, size = emoji.unet.config.cross_attention_dim, emoji.unet.config.sample_size
    x, context = torch.randn(2, 4, size, size), torch.randn(2, 3, width)
    unet = copy.deepcopy(emoji.unet)
    replace_layers(unet, CrossAttention, RecordedAttention.from_layer)
    assert close(unet(x, 5, context).sample, emoji.unet(x, 5, context).sample)
    maps = [layer.maps for layer in unet.modules() if isinstance(layer, RecordedAttention)]
    assert all(len(one) == 1 and close(one[0].sum(-1), torch.ones(())) for one in maps)
    assert {one[0].shape[-1] for one in maps} == {3}


@torch.no_grad()
def test_a_reference_unet_changes_the_output_and_is_not_saved_with_it(emoji):
    width, size = emoji.unet.config.cross_attention_dim, emoji.unet.config.sample_size
    x, context, other = torch.randn(2, 4, size, size), torch.randn(2, 1, width), torch.randn(2, 1, 4, size, size)
    unet, reference = copy.deepcopy(emoji.unet), copy.deepcopy(emoji.unet)
    connect_reference(unet, reference)
    outputs = []
    for image in other:
        reference(image, 5, context[:1])
        outputs.append(unet(x, 5, context).sample)
    assert not close(*outputs)
    assert unet.state_dict().keys() == emoji.unet.state_dict().keys()


def test_lora_is_trained_saved_and_loaded(emoji, drawing, tmp_path):
    width, size, before = emoji.unet.config.cross_attention_dim, emoji.unet.config.sample_size, run(emoji, drawing)
    unet = copy.deepcopy(emoji.unet)
    layers = train_lora(unet, emoji.scheduler, torch.randn(2, 4, size, size), torch.randn(2, 1, width))
    emoji.save_lora_weights(tmp_path, unet_lora_layers=layers)
    emoji.load_lora_weights(tmp_path)
    assert not torch.equal(run(emoji, drawing), before)
    emoji.unload_lora_weights()
    assert torch.equal(run(emoji, drawing), before)
