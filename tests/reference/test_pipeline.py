"""The pipeline against that of diffusers: same weights, same noise, same images."""

import itertools
import threading

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import imvar
from imvar.config import to_jsonable
from tests.reference.conftest import make_reference

SCHEDULERS = ["PNDMScheduler", "DDIMScheduler", "LMSDiscreteScheduler"]
PAIRS = {"one image": (1, 1), "two of each of two": (2, 2), "three of one": (1, 3)}


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def change_scheduler(name, *pipes, **changes):
    for pipe, library in zip(pipes, (imvar, diffusers), strict=True):
        pipe.scheduler = getattr(library, name).from_config(pipe.scheduler.config, **changes)


def rotated(photo, count):
    return [photo.rotate(90 * i).resize((150 + 40 * i, 120)) for i in range(count)]


def call(pipe, image, seed=5, **options):
    return pipe(image, generator=seeded(seed), **({"num_inference_steps": 3, "output_type": "np"} | options))


def same(out, expected):
    assert out.nsfw_content_detected == expected.nsfw_content_detected
    assert out.images.shape == expected.images.shape
    assert np.abs(out.images - expected.images).max() <= 1e-4
    assert np.ptp(expected.images) > 0.2


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("guidance", [1, 3, 7.5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_images(ours, ref, photo, name, guidance, pair):
    """Schedulers, guidance, eta, batches and images per prompt; then FreeU and slicing on top, together or in turn."""
    change_scheduler(name, ours, ref)
    batch, n = PAIRS[pair]
    image = rotated(photo, batch)
    for eta in (0.0, 0.6) if name == "DDIMScheduler" else (0.0,):
        options = {"guidance_scale": guidance, "eta": eta, "num_images_per_prompt": n}
        same(call(ours, image, **options), call(ref, image, **options))
    both = itertools.product((False, True), ("auto", "max", 2, None)) if guidance == 3 else [(True, "max")]
    for freeu, slicing in both:
        for pipe in (ours, ref):
            pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4) if freeu else pipe.disable_freeu()
            pipe.enable_attention_slicing(slicing) if slicing else pipe.disable_attention_slicing()
        same(call(ours, image, **options), call(ref, image, **options))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_longer_runs(ours, ref, photo, name, prediction):
    """Random networks amplify rounding over many steps. So compare once with the same networks in both pipelines, and
    once with each pipeline's own and a small output of the UNet.
    """
    change_scheduler(name, ours, ref, prediction_type=prediction)
    options = {"num_inference_steps": 25, "guidance_scale": 3}
    own = ours.unet, ours.vae
    ours.unet, ours.vae = ref.unet, ref.vae
    assert np.array_equal(call(ours, photo, **options).images, call(ref, photo, **options).images)
    ours.unet, ours.vae = own
    for unet in (ours.unet, ref.unet):
        unet.conv_out.weight.data *= 0.1
        unet.conv_out.bias.data *= 0.1
    same(call(ours, photo, **options), call(ref, photo, **options))


def test_every_scheduler_after_every_other(ours, ref, photo):
    for name in (*SCHEDULERS, *reversed(SCHEDULERS)):
        change_scheduler(name, ours, ref)
        same(call(ours, photo), call(ref, photo))


@pytest.mark.parametrize(
    ("steps", "skip_prk_steps"), [(1, True), (2, True), (5, True), (11, True), (4, False), (5, False), (11, False)]
)
@pytest.mark.parametrize("every", [1, 2, 3])
def test_callbacks(ours, ref, photo, steps, skip_prk_steps, every):
    change_scheduler("PNDMScheduler", ours, ref, skip_prk_steps=skip_prk_steps)
    both_calls = ([], [])
    for pipe, calls in zip((ours, ref), both_calls, strict=True):
        call(
            pipe,
            photo,
            num_inference_steps=steps,
            callback_steps=every,
            callback=lambda i, t, latents, calls=calls: calls.append((i, int(t), latents.clone())),
        )
    assert [entry[:2] for entry in both_calls[0]] == [entry[:2] for entry in both_calls[1]]
    for (*_, out), (*_, expected) in zip(*both_calls, strict=True):
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_outputs(ours, ref, photo, output_type, return_dict):
    out, expected = (
        call(pipe, rotated(photo, 2), output_type=output_type, return_dict=return_dict) for pipe in (ours, ref)
    )
    assert type(out).__name__ == type(expected).__name__
    assert out[1:] == expected[1:]
    if not return_dict:
        assert isinstance(out, tuple)
    if output_type == "pil":
        for a, b in zip(out[0], expected[0], strict=True):
            assert isinstance(a, Image.Image)
            assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1
    else:
        assert type(out[0]) is type(expected[0])
        assert np.abs(np.asarray(out[0]) - np.asarray(expected[0])).max() <= 1e-4


def test_sizes(ours, ref, photo):
    for height, width in ((64, 128), (72, 40), (136, 8)):
        same(call(ours, photo, height=height, width=width), call(ref, photo, height=height, width=width))
    assert call(ours, photo).images.shape == (1, 128, 128, 3)


def test_noise(ours, ref, photo):
    """One generator, a list of them, latents as an argument, and the noise of eta after either."""
    change_scheduler("DDIMScheduler", ours, ref)
    image, options = rotated(photo, 2), {"num_inference_steps": 3, "output_type": "np", "eta": 0.8}
    for noise in (
        lambda: {"generator": seeded()},
        lambda: {"generator": [seeded(i) for i in range(4)]},
        lambda: {"generator": seeded(), "latents": torch.randn(4, 4, 16, 16, generator=seeded(9))},
    ):
        out, expected = (pipe(image, num_images_per_prompt=2, **noise(), **options) for pipe in (ours, ref))
        same(out, expected)
    torch.manual_seed(7)
    out = ours(image, **options)
    torch.manual_seed(7)
    same(out, ref(image, **options))


def test_tensor_input(ours, ref, photo):
    pixels = ref.feature_extractor(images=rotated(photo, 2), return_tensors="pt").pixel_values
    same(call(ours, pixels), call(ref, pixels))
    same(call(ours, pixels[0]), call(ref, pixels[:1]))


def test_every_image_mode(ours, ref, photo):
    alpha = Image.linear_gradient("L").resize(photo.size)
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"):
        image = photo.convert(mode)
        if mode in ("LA", "RGBA"):
            image.putalpha(alpha)
        same(call(ours, image, num_inference_steps=2), call(ref, image, num_inference_steps=2))


def test_flagged_images_are_black(ours, ref, photo):
    """With thresholds at the median score, so that some are flagged."""
    image = rotated(photo, 4)
    pixels = call(ref, image, output_type="pil").images
    pixel_values = ref.feature_extractor(pixels, return_tensors="pt").pixel_values
    middle = ours.safety_checker.scores(pixel_values)[1].median(dim=0).values + 0.9
    for pipe in (ours, ref):
        pipe.safety_checker.concept_embeds_weights.data.fill_(2.0)
        pipe.safety_checker.concept_embeds_weights.data[3] = middle[3]
    for output_type in ("np", "pt"):
        out, expected = (call(pipe, image, output_type=output_type) for pipe in (ours, ref))
        assert out.nsfw_content_detected == expected.nsfw_content_detected
        assert sorted(set(out.nsfw_content_detected)) == [False, True]
        assert np.abs(np.asarray(out.images) - np.asarray(expected.images)).max() <= 1e-4
        assert [bool(x.max() == 0) for x in out.images] == out.nsfw_content_detected
    levels = [np.asarray(call(pipe, image, output_type="pil").images, int) for pipe in (ours, ref)]
    assert np.abs(levels[0] - levels[1]).max() <= 1


def test_without_a_safety_checker(ours, ref, photo):
    components = ours.components | {"safety_checker": None}
    with pytest.warns(UserWarning, match="safety_checker"):
        out = imvar.StableDiffusionImageVariationPipeline(**components)
    out.set_progress_bar_config(disable=True)
    expected = diffusers.StableDiffusionImageVariationPipeline(
        **(ref.components | {"safety_checker": None}), requires_safety_checker=False
    )
    expected.set_progress_bar_config(disable=True)
    assert call(out, photo).nsfw_content_detected is None
    same(call(out, photo), call(expected, photo))
    assert len(call(out, photo, return_dict=False)) == len(call(expected, photo, return_dict=False)) == 2


def test_slicing_and_tiling_of_the_autoencoder(ours, ref, photo):
    for pipe in (ours, ref):
        pipe.vae.enable_slicing()
        pipe.vae.enable_tiling()
    same(call(ours, rotated(photo, 2)), call(ref, rotated(photo, 2)))
    ours.disable_vae_slicing()
    ours.disable_vae_tiling()
    assert not ours.vae.use_slicing
    assert not ours.vae.use_tiling


SAVINGS = [{}, {"safe_serialization": False}, {"variant": "fp16"}, {"max_shard_size": "20KB"}]


def read(library, folder, options):
    reading = {"variant": options["variant"]} if "variant" in options else {}
    pipe = library.StableDiffusionImageVariationPipeline.from_pretrained(folder, **reading)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("options", SAVINGS, ids=str)
def test_saved_by_one_library_and_loaded_by_the_other(ours, ref, photo, tmp_path, options):
    ours.save_pretrained(tmp_path / "imvar", **options)
    ref.save_pretrained(tmp_path / "diffusers", **options)
    expected = call(ref, photo)
    same(call(read(imvar, tmp_path / "diffusers", options), photo), expected)
    same(call(read(diffusers, tmp_path / "imvar", options), photo), expected)
    assert np.array_equal(call(read(imvar, tmp_path / "imvar", options), photo).images, call(ours, photo).images)


def test_half_precision_is_as_accurate_as_in_diffusers(ours, ref, photo):
    latents = torch.randn(1, 4, 16, 16, generator=seeded()).bfloat16()
    exact = call(ref, photo, guidance_scale=3, latents=latents.float()).images
    half = (pipe.to(torch.bfloat16) for pipe in (ours, ref))
    out, expected = (call(pipe, photo, guidance_scale=3, latents=latents).images for pipe in half)
    assert (ours.dtype, ours.unet.dtype, ours.vae.dtype) == (torch.bfloat16,) * 3
    assert np.abs(out - exact).max() <= 2 * np.abs(expected - exact).max()  # rounding depends on the processor
    assert np.abs(out - exact).mean() <= 1.1 * np.abs(expected - exact).mean()


class Recorder:
    """A subclass as community code writes them: stages are overridden and call their base."""

    def _encode_image(self, image, device, num_images_per_prompt, do_classifier_free_guidance):
        embeds = super()._encode_image(image, device, num_images_per_prompt, do_classifier_free_guidance)
        self.embeds = embeds
        return embeds * 0.9

    def check_inputs(self, image, height, width, callback_steps):
        self.checked = (height, width, callback_steps)
        super().check_inputs(image, height, width, callback_steps)

    def prepare_latents(self, *args, **kwargs):
        latents = super().prepare_latents(*args, **kwargs)
        self.sigma = float(self.scheduler.init_noise_sigma)
        self.steps = len(self.scheduler.timesteps)
        return latents * 1.01

    def prepare_extra_step_kwargs(self, generator, eta):
        return super().prepare_extra_step_kwargs(generator, eta / 2)

    def run_safety_checker(self, image, device, dtype):
        image, _ = super().run_safety_checker(image, device, dtype)
        return image, [False] * len(image)


class ImvarRecorder(Recorder, imvar.StableDiffusionImageVariationPipeline):
    pass


class DiffusersRecorder(Recorder, diffusers.StableDiffusionImageVariationPipeline):
    pass


@pytest.mark.parametrize("name", SCHEDULERS)
def test_subclasses_that_override_stages(ours, ref, photo, name):
    change_scheduler(name, ours, ref)
    out, expected = ImvarRecorder(**ours.components), DiffusersRecorder(**ref.components)
    for pipe in (out, expected):
        pipe.set_progress_bar_config(disable=True)
    options = {"eta": 0.8, "num_images_per_prompt": 2, "guidance_scale": 3}
    same(call(out, photo, **options), call(expected, photo, **options))
    assert torch.allclose(out.embeds, expected.embeds, atol=1e-5)
    assert (out.checked, out.sigma, out.steps) == (expected.checked, expected.sigma, expected.steps)


@pytest.mark.filterwarnings("ignore")
def test_stages_called_by_hand(ours, ref, photo):
    """A custom loop over the pipeline's stages, as in community code."""
    results = []
    for pipe in (ours, ref):
        context = pipe._encode_image(photo, "cpu", 2, True)
        pipe.scheduler.set_timesteps(4, device="cpu")
        x = pipe.prepare_latents(2, 4, 64, 64, context.dtype, torch.device("cpu"), seeded(), None)
        options = pipe.prepare_extra_step_kwargs(seeded(), 0.0)
        with torch.no_grad():
            for t in pipe.progress_bar(pipe.scheduler.timesteps):
                doubled = pipe.scheduler.scale_model_input(torch.cat([x] * 2), t)
                uncond, cond = pipe.unet(doubled, t, encoder_hidden_states=context).sample.chunk(2)
                x = pipe.scheduler.step(uncond + 3 * (cond - uncond), t, x, **options).prev_sample
            array = pipe.decode_latents(x)
            results.append((context, array, *pipe.run_safety_checker(array.copy(), "cpu", context.dtype)))
            assert len(pipe.numpy_to_pil(array)) == 2
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert np.abs(results[0][1] - results[1][1]).max() <= 1e-4
    assert results[0][3] == results[1][3]


def test_threads_share_one_pipeline(ours, ref, photo):
    """Every thread returns the images of a single call, with any scheduler in the others."""
    expected = [call(ref, photo, seed=i, num_inference_steps=3 + i % 3).images for i in range(6)]
    results = [None] * 6

    def work(i):
        results[i] = call(ours, photo, seed=i, num_inference_steps=3 + i % 3).images

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.abs(a - b).max() <= 1e-4 for a, b in zip(results, expected, strict=True))


def test_sample_size_of_old_unets_is_64(ref_folder, tmp_path):
    for library in (imvar, diffusers):
        pipe = library.StableDiffusionImageVariationPipeline.from_pretrained(ref_folder)
        pipe.save_pretrained(tmp_path)
        config = tmp_path / "unet" / "config.json"
        config.write_text(config.read_text().replace('"0.42.1"', '"0.8.0.dev0"'))
        old = library.StableDiffusionImageVariationPipeline.from_pretrained(tmp_path)
        assert old.unet.config.sample_size == 64


def test_configs_are_equal(ours, ref):
    assert ours.components.keys() == ref.components.keys()
    for name in ("vae", "unet", "scheduler"):
        expected = {key: value for key, value in getattr(ref, name).config.items() if not key.startswith("_")}
        assert to_jsonable(getattr(ours, name).config).items() >= to_jsonable(expected).items()
    encoder = transformers.CLIPVisionConfig(**ours.image_encoder.config.to_dict())
    assert encoder.to_diff_dict() == ref.image_encoder.config.to_diff_dict() | {"architectures": encoder.architectures}
    for key in ("resample", "do_resize", "do_center_crop", "do_rescale", "rescale_factor", "do_normalize"):
        assert getattr(ours.feature_extractor, key) == getattr(ref.feature_extractor, key)
    assert list(ours.feature_extractor.image_mean) == list(ref.feature_extractor.image_mean)
    index = {key: list(value) for key, value in ref.config.items() if isinstance(value, tuple)}
    assert (
        to_jsonable(ours.config).items()
        >= (index | {"feature_extractor": ["transformers", "CLIPImageProcessor"]}).items()
    )


def test_an_image_of_one_latent_is_made_where_a_group_of_a_norm_has_one_channel(photo, tmp_path):
    ref = make_reference(norm_num_groups=16, block_out_channels=(16, 16))
    ref.save_pretrained(tmp_path)
    ours = imvar.StableDiffusionImageVariationPipeline.from_pretrained(tmp_path)
    options = {"height": 8, "width": 8, "num_inference_steps": 2, "guidance_scale": 3, "output_type": "np"}
    expected, image = (pipe(photo, generator=seeded(), **options).images for pipe in (ref, ours))
    exact = ref.to(torch.float64)(photo, generator=seeded(), **options).images  # such a group enlarges rounding errors
    assert np.abs(image - exact).max() <= 1e-4 + np.abs(expected - exact).max()
