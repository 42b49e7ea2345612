"""`image_embeds`, `negative_image_embeds` and `encode_image`: embeddings in the place of images."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from imvar import (
    CheckpointError,
    DDIMScheduler,
    InputError,
    InputTypeError,
    LMSDiscreteScheduler,
    Region,
    StableDiffusionImageVariationPipeline,
    load_image_embeds,
    mix,
    save_image_embeds,
)
from imvar.image.pixel_values import to_pixel_values
from tests.support.offloading import offload_to_meta


def run(pipe, *args, **options) -> Tensor:
    return pipe(*args, **({"num_inference_steps": 2, "output_type": "latent", "seed": 1} | options)).images


@pytest.fixture
def photos(photo):
    return [photo, photo.rotate(90, expand=True)]


# ---- embeddings in place of images


@pytest.mark.parametrize("guidance_scale", [1, 3])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("b", [1, 2])
def test_embeddings_of_images_give_the_images_variations(pipe, photos, b, n, guidance_scale):
    options = {"num_images_per_prompt": n, "guidance_scale": guidance_scale}
    embeds = pipe.encode_image(photos[:b])
    assert embeds.shape == (b, 1, 24)
    expected = run(pipe, photos[:b], **options)
    pipe.image_encoder = None
    for same in (embeds, embeds[:, 0]):
        assert torch.equal(run(pipe, image_embeds=same, **options), expected)


def test_the_images_are_equal_too(pipe, photos):
    expected = pipe(photos, seed=1, num_inference_steps=2)
    result = pipe(image_embeds=pipe.encode_image(photos), seed=1, num_inference_steps=2)
    assert [image.tobytes() for image in result.images] == [image.tobytes() for image in expected.images]
    assert (result.nsfw_content_detected, result.seeds) == (expected.nsfw_content_detected, expected.seeds)


@pytest.mark.parametrize(
    "dtypes", [("float16",) * 2, ("bfloat16",) * 2, ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_in_half_precision_too(pipe, photos, dtypes):
    encoder_dtype, unet_dtype = (getattr(torch, dtype) for dtype in dtypes)
    pipe.to(dtype=unet_dtype)
    pipe.image_encoder.to(encoder_dtype)
    embeds = pipe.encode_image(photos)
    assert embeds.dtype == encoder_dtype
    assert torch.equal(run(pipe, image_embeds=embeds), run(pipe, photos))


@pytest.mark.parametrize("kind", ["one image", "a tuple", "normalized pixels", "one image's pixels"])
def test_encode_image_takes_what_a_call_takes(pipe, photo, kind):
    pixels = pipe.feature_extractor(photo, return_tensors="pt").pixel_values
    image = {"one image": photo, "a tuple": (photo,), "normalized pixels": pixels, "one image's pixels": pixels[0]}[
        kind
    ]
    assert torch.equal(pipe.encode_image(image), pipe.encode_image([photo]))
    assert torch.equal(run(pipe, image_embeds=pipe.encode_image(image)), run(pipe, image))


def test_a_pipeline_loads_and_runs_without_an_encoder(pipe, photos, checkpoint, tmp_path):
    whole = StableDiffusionImageVariationPipeline.from_pretrained(checkpoint)
    expected, file = run(whole, photos), tmp_path / "photos.safetensors"
    save_image_embeds(file, whole.encode_image(photos))
    partial = StableDiffusionImageVariationPipeline.from_pretrained(checkpoint, image_encoder=None)
    assert torch.equal(run(partial, image_embeds=load_image_embeds(file)), expected)
    for attempt in (lambda: run(partial, photos), lambda: partial.encode_image(photos)):
        with pytest.raises(InputTypeError, match=r"image_encoder: expected .*, got None"):
            attempt()
    partial.save_pretrained(tmp_path / "partial")
    assert not (tmp_path / "partial" / "image_encoder").exists()
    with pytest.raises(CheckpointError, match=r"image_encoder: .* pass from_pretrained\(..., image_encoder=...\)"):
        StableDiffusionImageVariationPipeline.from_pretrained(tmp_path / "partial")
    again = StableDiffusionImageVariationPipeline.from_pretrained(tmp_path / "partial", image_encoder=None)
    assert torch.equal(run(again, image_embeds=load_image_embeds(file)), expected)


def test_a_weighted_sum_of_one_embedding_is_its_image(pipe, photos):
    a, b = pipe.encode_image(photos).split(1)
    assert torch.equal(run(pipe, image_embeds=mix([(a, 1), (b, 0)])), run(pipe, image_embeds=a))
    between = run(pipe, image_embeds=mix([(a, 0.5), (b, 0.5)]))
    assert not torch.equal(between, run(pipe, image_embeds=a))


@pytest.mark.parametrize(
    "options",
    [
        {"cache_interval": 2, "num_inference_steps": 4},
        {"guidance_interval": (0.0, 0.5)},
        {"height": 72, "width": 40},
        {"generator": torch.Generator(), "seed": None},
        {"latents": torch.ones(2, 4, 16, 16), "seed": None},
        {"eta": 0.5, "scheduler": DDIMScheduler},
        {"scheduler": LMSDiscreteScheduler},
        {"setting": lambda pipe: pipe.enable_attention_slicing(1)},
        {"setting": lambda pipe: pipe.enable_model_cpu_offload(device="cpu:0")},
        {"setting": lambda pipe: pipe.unet.register_forward_hook(lambda *_: None)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_under_other_options_too(pipe, photos, options):
    options = dict(options)
    options.pop("setting", lambda pipe: None)(pipe)
    if scheduler := options.pop("scheduler", None):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    outputs = []
    for image in ({"image": photos}, {"image_embeds": pipe.encode_image(photos)}):
        if "generator" in options:
            options["generator"].manual_seed(5)
        outputs.append(run(pipe, **image, **options))
    assert torch.equal(*outputs)


def test_an_offloaded_encoder_moves_to_encode_and_back(pipe, photo, monkeypatch):
    """It is on the meta device in between."""
    expected = pipe.encode_image(photo)
    offload_to_meta(pipe, monkeypatch)
    for preprocess in ("clip", "clip", "card"):
        embeds = pipe.encode_image(photo, preprocess)
        assert {next(module.parameters()).device.type for module in pipe.modules.values()} == {"meta"}
        assert torch.equal(embeds, expected) == (preprocess == "clip")


def test_a_callback_needs_no_encoder(pipe, photo):
    expected, embeds = run(pipe, photo), pipe.encode_image(photo)
    pipe.image_encoder = None
    assert torch.equal(run(pipe, image_embeds=embeds, callback=lambda *_: None), expected)


# ---- preprocessing


@pytest.mark.parametrize("preprocess", ["card", "training"])
def test_the_models_own_preprocessing_reaches_the_encoder(pipe, photos, preprocess):
    extractor, inputs = pipe.feature_extractor, []
    pixels = to_pixel_values(photos, preprocess, (32, 32), extractor.image_mean, extractor.image_std)
    pipe.image_encoder.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    embeds = pipe.encode_image(photos, preprocess=preprocess)
    assert torch.equal(inputs[0], pixels)
    assert torch.equal(embeds, pipe.encode_image(pixels))
    assert not torch.allclose(embeds, pipe.encode_image(photos), atol=1e-3)
    assert torch.equal(run(pipe, image_embeds=embeds), run(pipe, pixels))


def test_clip_is_the_default(pipe, photos):
    assert torch.equal(pipe.encode_image(photos, preprocess="clip"), pipe.encode_image(photos))
    assert torch.equal(pipe.encode_image(photos, "card"), pipe.encode_image(photos, preprocess="card"))


def test_size_mean_and_deviation_are_the_extractors(pipe, photo):
    extractor = pipe.feature_extractor
    settings = {"do_center_crop": False, "size": {"height": 32, "width": 32}, "crop_size": 7, "image_mean": 0.5}
    for name, value in (settings | {"image_std": [0.5, 0.4, 0.3]}).items():
        setattr(extractor, name, value)
    pixels = to_pixel_values(photo, "card", (32, 32), 0.5, [0.5, 0.4, 0.3])
    assert torch.equal(pipe.encode_image(photo, "card"), pipe.encode_image(pixels))


def test_an_extractor_of_transformers_has_them_too(pipe, photo):
    transformers = pytest.importorskip("transformers")
    expected = pipe.encode_image(photo, "card")
    processor = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil
    pipe.feature_extractor = processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    assert torch.equal(pipe.encode_image(photo, "card"), expected)
    pipe.feature_extractor.do_center_crop = False
    with pytest.raises(InputError, match="feature_extractor: expected one that returns a height and width"):
        pipe.encode_image(photo, "card")


class Extractor:
    """Another feature extractor, without the fields of CLIP's."""

    def __call__(self, images, return_tensors):
        raise AssertionError


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda pipe: setattr(pipe, "safety_checker", None) or setattr(pipe, "feature_extractor", None), "None"),
        (lambda pipe: setattr(pipe, "feature_extractor", Extractor()), "another Extractor"),
        (lambda pipe: setattr(pipe.feature_extractor, "do_center_crop", False), "another CLIPImageProcessor"),
        (lambda pipe: setattr(pipe.feature_extractor, "do_normalize", False), "another CLIPImageProcessor"),
    ],
    ids=["none", "third-party", "no crop", "not normalizing"],
)
def test_an_extractor_without_them_is_refused(pipe, photo, change, got):
    change(pipe)
    with pytest.raises(InputError, match=f"feature_extractor: expected .*, got {got}; pass preprocess='clip'"):
        pipe.encode_image(photo, "card")


@pytest.mark.parametrize(
    ("image", "preprocess", "kind", "message"),
    [
        (None, "clip", InputTypeError, "image: expected a PIL image, .*, got NoneType"),
        ([], "card", InputTypeError, "image: expected at least one image, got an empty list"),
        ("fox.png", "clip", InputTypeError, "image: expected a PIL image, .*, got str"),
        (torch.zeros(1, 3, 16, 16), "card", InputTypeError, "image: expected a PIL image, got a tensor of shape"),
        (torch.full((1, 3, 16, 16), torch.nan), "clip", InputError, "image: expected finite values"),
        ([np.zeros((9, 9, 3), np.uint8)], "card", InputTypeError, r"image\[0\]: expected a PIL image, got an array"),
        (Image.new("F", (9, 9)), "clip", InputError, "image: expected 8 or 16 bits, got mode F"),
        ([Image.new("F", (9, 9))], "training", InputError, r"image\[0\]: expected 8 or 16 bits, got mode F"),
        (Image.new("RGB", (9, 9)), "Clip", InputError, "preprocess: expected one of 'clip', 'card', 'training', got"),
        (Image.new("RGB", (9, 9)), None, InputTypeError, "preprocess: expected one of 'clip', 'card', 'training'"),
    ],
)
def test_images_that_cannot_be_encoded_are_refused(pipe, image, preprocess, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        pipe.encode_image(image, preprocess)


# ---- negative embeddings


def test_a_negative_embedding_replaces_the_zeros(pipe, photo):
    embeds = pipe.encode_image(photo)
    expected = run(pipe, photo)
    assert torch.equal(run(pipe, photo, negative_image_embeds=torch.zeros_like(embeds)), expected)
    negative = run(pipe, photo, negative_image_embeds=pipe.encode_image(photo.rotate(180)))
    assert not torch.allclose(negative, expected, atol=1e-3)


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, InputError, "image_embeds: expected image or image_embeds, got both"),
        ({"image": None, "image_embeds": None}, InputTypeError, "image: .*got NoneType; pass image or image_embeds"),
        ({"image": None, "image_embeds": torch.zeros(1, 2, 24)}, InputError, "image_embeds: .*, one token per image"),
        ({"image": None, "image_embeds": torch.zeros(1, 1, 1, 24)}, InputError, r"image_embeds: .* \(1, 1, 1, 24\)"),
        ({"image": None, "image_embeds": torch.zeros(0, 1, 24)}, InputError, r"image_embeds: .* \(0, 1, 24\)"),
        (
            {"image": None, "image_embeds": torch.zeros(1, 1, 5)},
            InputError,
            "image_embeds: .* as wide",
        ),
        ({"image": None, "image_embeds": torch.zeros(24)}, InputError, r"image_embeds: expected a tensor \(b, 1, c\)"),
        ({"image": None, "image_embeds": torch.zeros(1, 1, 24).long()}, InputTypeError, "image_embeds: .*torch.int64"),
        ({"image": None, "image_embeds": torch.full((1, 1, 24), torch.nan)}, InputError, "image_embeds: .* got NaN"),
        ({"image": None, "image_embeds": torch.full((1, 24), torch.inf)}, InputError, "image_embeds: .* infinite"),
        ({"image": None, "image_embeds": torch.ones(1, 1, 24).to("meta")}, InputError, "image_embeds: .*with values"),
        ({"image": None, "image_embeds": "fox"}, InputTypeError, "image_embeds: expected a tensor .*, got str"),
        ({"image": None, "image_embeds": [torch.zeros(1, 1, 24)]}, InputTypeError, "image_embeds: .*, got a tensor"),
        ({"image": None, "image_embeds": np.zeros((1, 1, 24))}, InputTypeError, "image_embeds: .*, got an array"),
        ({"image": None, "height": 13}, InputError, "height: expected a multiple of 8"),
        ({"negative_image_embeds": torch.zeros(3, 1, 24), "image_embeds": None}, InputError, "each of 1 images"),
        (
            {"negative_image_embeds": torch.zeros(1, 1, 24), "image_embeds": None, "guidance_scale": 1},
            InputError,
            "only under guidance",
        ),
    ],
)
def test_embeddings_that_cannot_be_used_are_refused(pipe, photo, options, kind, message):
    with pytest.raises(kind, match=message):
        run(pipe, **({"image": photo, "image_embeds": torch.zeros(1, 1, 24)} | options))


def test_embeddings_that_overflow_in_half_precision_are_refused(pipe):
    pipe.to(dtype=torch.float16)
    large, small = torch.full((1, 1, 24), -1e6), torch.zeros(1, 1, 24)
    for name, options in [
        ("image_embeds", {"image_embeds": large}),
        ("negative_image_embeds", {"image_embeds": small, "negative_image_embeds": large}),
        ("image_embeds", {"image_embeds": [Region(large)]}),
    ]:
        with pytest.raises(InputError, match=rf"^{name}: .* within torch.float16, got values up to 1e\+06"):
            run(pipe, **options)


# ---- subclasses


class OwnEncoding(StableDiffusionImageVariationPipeline):
    """Two tokens of its own per image."""

    def _encode_image(self, image, device, num_images_per_prompt, do_classifier_free_guidance):
        context = torch.ones(num_images_per_prompt, 2, 24)
        return torch.cat([torch.zeros_like(context), context]) if do_classifier_free_guidance else context


def test_a_subclass_with_its_own_encoding_runs_and_refuses_embeddings(pipe, photo):
    own = OwnEncoding(**pipe.components)
    assert run(own, photo).isfinite().all()
    assert run(own, image=photo, guidance_scale=1).isfinite().all()
    with pytest.raises(InputError, match=r"image_embeds: expected none, .* has its own _encode_image"):
        run(own, image_embeds=torch.zeros(1, 1, 24))


def test_a_check_of_images_in_a_subclass_gets_no_missing_image(pipe, photo):
    checked = []

    class Checks(StableDiffusionImageVariationPipeline):
        def check_inputs(self, image, height, width, callback_steps):
            checked.append(image.size)
            super().check_inputs(image, height, width, callback_steps)

    own = Checks(**pipe.components)
    expected = run(own, photo)
    assert torch.equal(run(own, image_embeds=own.encode_image(photo)), expected)
    assert checked == [photo.size]


def test_a_truncated_file_is_refused_by_name(pipe, photo):
    file = io.BytesIO()
    photo.save(file, "PNG")
    for preprocess in ("clip", "card"):
        with pytest.raises(InputError, match=r"image\[1\]: expected a readable image"):
            pipe.encode_image([photo, Image.open(io.BytesIO(file.getvalue()[:900]))], preprocess)
