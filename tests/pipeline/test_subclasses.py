"""Subclasses of the pipeline with their own stages and settings, and third-party components that lack methods."""

import json

import pytest
import torch
from torch import nn

from imvar import CheckpointError, InputError, StableDiffusionImageVariationPipeline
from imvar.outputs import DecoderOutput


def run(pipe, image, **options):
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "guidance_scale": 3, "output_type": "pt", "generator": generator} | options
    return pipe(image, **options).images


def subclass(kind, pipe, **changes):
    own = kind(**(pipe.components | changes))
    own.set_progress_bar_config(disable=True)
    return own


class Embeddings(StableDiffusionImageVariationPipeline):
    """Takes embeddings (b, c) or tokens (b, m, c), as an array, a tensor or a list, in place of images."""

    def _encode_image(self, image, device, num_images_per_prompt, do_classifier_free_guidance):
        image = torch.stack(image) if isinstance(image, list) else torch.as_tensor(image)
        context = (image if image.ndim == 3 else image[:, None]).repeat_interleave(num_images_per_prompt, 0)
        return torch.cat([torch.zeros_like(context), context]) if do_classifier_free_guidance else context


@pytest.mark.parametrize(
    "image",
    [torch.ones(2, 24), torch.ones(2, 1, 24), torch.ones(2, 5, 24), [torch.ones(24)] * 2, torch.ones(2, 24).numpy()],
    ids=["b c", "b 1 c", "b m c", "list", "array"],
)
def test_a_subclass_with_its_own_encoding_takes_embeddings_and_needs_no_image_encoder(pipe, image):
    own = subclass(Embeddings, pipe, image_encoder=None, safety_checker=None, requires_safety_checker=False)
    seen = []
    images = run(own, image, num_images_per_prompt=2, callback=lambda i, t, latents: seen.append(own.unet.train(False)))
    assert len(images) == 4
    assert len(seen) == 2
    assert torch.allclose(images, run(own, torch.ones(2, 24), num_images_per_prompt=2), atol=1e-4)


def test_an_encoding_set_on_the_pipeline_counts_as_its_own(pipe):
    pipe._encode_image = Embeddings._encode_image.__get__(pipe)
    pipe.image_encoder = None
    assert len(run(pipe, torch.ones(2, 3, 24))) == 2
    del pipe._encode_image
    with pytest.raises(InputError, match="image_encoder: expected a CLIPVisionModelWithProjection, got None"):
        run(pipe, torch.ones(2, 3, 24))


def test_a_pipeline_without_an_image_encoder_is_saved_and_loaded(pipe, tmp_path):
    own = subclass(Embeddings, pipe, image_encoder=None)
    own.save_pretrained(tmp_path)
    loaded = Embeddings.from_pretrained(tmp_path, image_encoder=None)
    assert torch.equal(run(loaded, torch.ones(1, 24)), run(own, torch.ones(1, 24)))


class Offset(StableDiffusionImageVariationPipeline):
    def __init__(self, *args, offset=None, scales=(1.0, 2.0), names=("a", "b"), pose_encoder=None, **components):
        super().__init__(*args, **components)
        self.register_modules(pose_encoder=pose_encoder)
        self.register_to_config(offset=offset, scales=scales, names=names)


def test_lists_among_the_settings_of_a_subclass_are_saved_and_loaded(pipe, tmp_path):
    Offset(**pipe.components, offset=[0.1, 0.2, 0.3], names=["left", "right"]).save_pretrained(tmp_path)
    loaded = Offset.from_pretrained(tmp_path)
    assert loaded.config["offset"] == [0.1, 0.2, 0.3]
    assert loaded.config["scales"] == [1.0, 2.0]
    assert loaded.config["names"] == ["left", "right"]
    assert Offset.from_pretrained(tmp_path, offset=None).config["offset"] is None


def test_a_component_among_the_keywords_of_a_subclass_is_still_one(pipe, tmp_path):
    Offset(**pipe.components).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"pose_encoder": ["mylib", "PoseEncoder"]}))
    with pytest.raises(CheckpointError, match=r"pose_encoder: .*got 'PoseEncoder'.* pass pose_encoder="):
        Offset.from_pretrained(tmp_path)
    assert Offset.from_pretrained(tmp_path, pose_encoder=None).pose_encoder is None


class Negated(StableDiffusionImageVariationPipeline):
    def predictor(self, timesteps, context):
        predict = super().predictor(timesteps, context)
        return lambda x, step: -predict(x, step)


def test_a_predictor_of_two_arguments_is_called_with_two(pipe, photo):
    own = subclass(Negated, pipe)
    images = run(own, photo)
    with pytest.raises(InputError, match=r"cache_interval: expected 1, got 2; .* a predictor that takes it"):
        run(own, photo, cache_interval=2)
    plain = run(pipe, photo)
    assert not torch.allclose(images, plain, atol=1e-3)
    pipe.unet.conv_out.weight.data *= -1
    pipe.unet.conv_out.bias.data *= -1
    assert torch.allclose(images, run(pipe, photo), atol=1e-5)


class SameSize(nn.Module):
    """A decoder that does not enlarge."""

    def __init__(self, config):
        super().__init__()
        self.config, self.conv = config, nn.Conv2d(4, 3, 1)

    def decode(self, latents, return_dict=True):
        return DecoderOutput(self.conv(latents)) if return_dict else (self.conv(latents),)


def test_images_of_another_size_from_a_custom_decoder_are_warned_about(pipe, photo):
    pipe.vae = SameSize(pipe.vae.config)
    with pytest.warns(UserWarning, match=r"vae: expected images of \(128, 128\), got \(16, 16\)"):
        assert run(pipe, photo).shape[2:] == (16, 16)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("vae", "enable_vae_slicing"),
        ("vae", "enable_vae_tiling"),
        ("vae", "disable_vae_tiling"),
        ("unet", "enable_attention_slicing"),
        ("unet", "disable_freeu"),
        ("unet", "disable_xformers_memory_efficient_attention"),
    ],
)
def test_a_setting_that_no_component_has_is_refused_by_name(pipe, name, method):
    pipe.unet = pipe.vae = nn.Identity()
    for kind in InputError, AttributeError:
        with pytest.raises(kind, match=f"{name}: expected a component with .*, got Identity"):
            getattr(pipe, method)()


@pytest.mark.filterwarnings("ignore:memory-efficient attention")
def test_memory_efficient_attention_is_set_where_components_have_it(pipe, photo):
    pipe.vae = SameSize(pipe.vae.config)
    pipe.enable_xformers_memory_efficient_attention(lambda q, k, v: v.mean(2, keepdim=True).expand_as(q))
    assert pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.backend is not None
    pipe.disable_xformers_memory_efficient_attention()
