"""The examples of scripts/fork.py that docs/forking.md explains, on the bundled checkpoint."""

import pytest
import torch
from fork import ConcatPipeline, MotionUNet, PosePipeline, TinyDecoder, wider_input

import imvar
from imvar import StableDiffusionImageVariationPipeline

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
