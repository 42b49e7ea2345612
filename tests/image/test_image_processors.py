"""Image processors without the reference: values, types, immutability and invalid arguments."""

import copy
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imvar.errors import CheckpointError, InputError, InputTypeError
from imvar.image import CLIPImageProcessor, VaeImageProcessor, clip_tensor, numpy_to_pil, to_uint8
from imvar.image.clip import CLIP_MEAN, CLIP_STD


def noise(width=40, height=30, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


IMAGE = Image.fromarray(noise())
PLAIN = CLIPImageProcessor(do_resize=False, do_center_crop=False, do_normalize=False, rescale_factor=1)


def to_array(image, **call):
    return PLAIN(image, return_tensors="np", **call).pixel_values[0].transpose(1, 2, 0)


# ---- CLIPImageProcessor


def test_values():
    pixels = CLIPImageProcessor()(Image.new("RGB", (300, 260), (255, 0, 51)), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 224, 224)
    assert pixels.dtype == torch.float32
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    assert torch.equal(pixels, expected[None, :, None, None].expand_as(pixels))


def test_a_batch_equals_its_images():
    images = [IMAGE, IMAGE.rotate(90, expand=True), IMAGE.convert("L")]
    processor = CLIPImageProcessor()
    batch = processor(images, return_tensors="pt").pixel_values
    assert torch.equal(batch, torch.cat([processor(image, return_tensors="pt").pixel_values for image in images]))


def test_every_kind_of_input_agrees():
    x = noise()
    kinds = [
        x,
        x.transpose(2, 0, 1),
        torch.from_numpy(x),
        torch.from_numpy(x).permute(2, 0, 1),
        x[None],
        [x],
        (IMAGE,),
        x.astype(float),
        torch.from_numpy(x).bfloat16(),
        torch.from_numpy(x).float().requires_grad_(),
    ]
    expected = CLIPImageProcessor()(IMAGE, return_tensors="np").pixel_values
    assert all(np.array_equal(CLIPImageProcessor()(kind, return_tensors="np").pixel_values, expected) for kind in kinds)


def test_arguments_are_not_changed():
    image, array, size = Image.fromarray(noise(channels=4)), noise(), {"shortest_edge": 20}
    before = image.mode, image.tobytes()
    processor = CLIPImageProcessor(size=size)
    size["shortest_edge"] = 7
    processor([image, array], return_tensors="pt").pixel_values.zero_()
    assert processor.size == {"shortest_edge": 20}
    assert (image.mode, image.tobytes()) == before
    assert np.array_equal(array, noise())
    floats = noise().transpose(2, 0, 1).astype(np.float32)
    PLAIN(floats, do_rescale=False).pixel_values[0][:] = 0
    assert np.array_equal(floats, noise().transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_16_bits_are_scaled(mode):
    values = np.array([[0, 128, 129, 257, 1000, 32896, 65535]], "<u2")
    data = values.byteswap() if mode == "I;16B" else values
    image = Image.frombytes(mode, (7, 1), data.tobytes())
    assert to_array(image)[0].tolist() == [[v] * 3 for v in (0, 0, 1, 1, 4, 128, 255)]


def test_a_16_bit_file_equals_its_8_bit_version(tmp_path):
    grey = noise(channels=1)[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(to_array(Image.open(tmp_path / "deep.png")), to_array(Image.fromarray(grey)))


def test_mode_i_is_8_bit_up_to_255_and_16_bit_above():
    assert to_array(Image.fromarray(np.array([[0, 255]], np.int32)))[0, :, 0].tolist() == [0, 255]
    assert to_array(Image.fromarray(np.array([[0, 255, 65535]], np.int32)))[0, :, 0].tolist() == [0, 1, 255]


def test_an_extreme_aspect_ratio_takes_little_memory():
    """Resized before the crop it has 224 x 13,440,000 pixels: 12 GB."""
    code = """if True:
        import resource
        from PIL import Image
        from imvar.image import CLIPImageProcessor
        processor = CLIPImageProcessor()
        processor(Image.new("RGB", (640, 480)), return_tensors="pt")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for size in (1, 60000), (60000, 1):
            processor(Image.new("RGB", size), return_tensors="pt")
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert float(run.stdout) < 100  # MB


def test_config_fields_are_attributes():
    processor = CLIPImageProcessor(size=224, crop_size=[224, 200])
    assert processor.size == {"shortest_edge": 224}
    assert processor.crop_size == {"height": 224, "width": 200}
    assert processor.image_mean == CLIP_MEAN
    processor.size = 32
    assert processor.config.size == {"shortest_edge": 32}
    with pytest.raises(InputError, match=r"size: expected .*, got 0"):
        processor.size = 0
    assert processor.size == {"shortest_edge": 32}
    with pytest.raises(AttributeError, match="no attribute or config field 'sise'"):
        _ = processor.sise


def test_copies():
    processor = CLIPImageProcessor(size=20, crop_size=18)
    for twin in (copy.copy(processor), copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert twin.config.to_dict() == processor.config.to_dict()
        twin.size = 30
        assert processor.size == {"shortest_edge": 20}


def test_files_keep_unknown_fields(tmp_path):
    name = tmp_path / "preprocessor_config.json"
    name.write_text(json.dumps({"size": 30, "crop_size": 20, "feature_extractor_type": "CLIPFeatureExtractor"}))
    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    assert processor.feature_extractor_type == "CLIPFeatureExtractor"
    processor.save_pretrained(tmp_path)
    written = json.loads(name.read_text())
    assert written["feature_extractor_type"] == "CLIPFeatureExtractor"
    assert written["image_processor_type"] == "CLIPImageProcessor"
    assert not [key for key in written if key.startswith("_")]
    assert written["size"] == {"shortest_edge": 30}
    CLIPImageProcessor.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert json.loads(name.read_text()) == written


def test_results():
    batch = CLIPImageProcessor()(IMAGE, return_tensors="pt")
    assert batch["pixel_values"] is batch.pixel_values
    assert batch.to(torch.float16) is batch
    assert batch.pixel_values.dtype == torch.float16
    assert CLIPImageProcessor().preprocess(IMAGE, return_tensors="np").pixel_values.shape == (1, 3, 224, 224)
    with pytest.raises(InputTypeError, match="return_tensors='pt'"):
        CLIPImageProcessor()(IMAGE).to("cpu")


# ---- invalid arguments

HALF = io.BytesIO()
IMAGE.save(HALF, "PNG")


def half_a_file():
    return Image.open(io.BytesIO(HALF.getvalue()[:900]))


NAN = np.full((30, 40, 3), np.nan, np.float32)


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (None, InputTypeError, "images: expected a PIL image, .*, got NoneType"),
        ("photo.png", InputTypeError, "images: expected a PIL image, .*, got str; open files"),
        (b"\x89PNG", InputTypeError, "images: .*got bytes"),
        (io.BytesIO(), InputTypeError, "images: .*got BytesIO"),
        (True, InputTypeError, "images: .*got bool"),
        (3.5, InputTypeError, "images: .*got float"),
        ([], InputTypeError, "images: .*got an empty list"),
        ((), InputTypeError, "images: .*got an empty tuple"),
        ([IMAGE, None], InputTypeError, r"images\[1\]: .*got NoneType"),
        ([IMAGE, IMAGE, "http://x/y.png"], InputTypeError, r"images\[2\]: .*got str"),
        ([[IMAGE]], InputTypeError, r"images\[0\]: .*got list"),
        ({"a": IMAGE}, InputTypeError, "images: .*got dict"),
        (noise()[..., 0], InputError, r"images: expected shape \(h, w, 3\) .*, got shape \(30, 40\)"),
        (
            [IMAGE, noise()[..., :2]],
            InputError,
            r"images\[1\]: expected 1, 3 or 4 channels .*, got shape \(30, 40, 2\)",
        ),
        (
            noise()[:3],
            InputError,
            r"images: expected an unambiguous shape, got shape \(3, 40, 3\); pass input_data_format=",
        ),
        (np.zeros((0, 5, 3), np.uint8), InputError, r"images: .*got shape \(0, 5, 3\)"),
        (np.zeros((0, 5, 5, 3), np.uint8), InputError, r"images: .*got an empty batch of shape \(0, 5, 5, 3\)"),
        (np.zeros((1, 1, 5, 5, 3), np.uint8), InputError, r"images: .*got shape \(1, 1, 5, 5, 3\)"),
        (noise() > 9, InputTypeError, "images: .*got values of bool"),
        (noise().astype(complex), InputTypeError, "images: .*got values of complex128"),
        (noise().astype(object), InputTypeError, "images: .*got values of object"),
        (noise().astype(np.uint16) * 257, InputError, r"images: expected integers from 0 to 255, got \d+ to 65535"),
        (noise().astype(np.int16) - 128, InputError, r"images: expected integers from 0 to 255, got -128 to"),
        (NAN, InputError, "images: .*got NaN or infinite"),
        (torch.from_numpy(NAN), InputError, "images: .*got NaN or infinite"),
        ([np.stack([noise() / 1.0, NAN])], InputError, r"images\[0\]\[1\]: .*got NaN or infinite"),
        (noise() / 255, InputError, r"images: .*got floats from 0\.0 to 1\.0; .* do_rescale=False"),
        (noise() / 127.5 - 1, InputError, r"images: .*got floats from -1\.0 to"),
        (noise() + 0.3, InputError, r"images: expected values from 0 to 255 with do_rescale=True, got floats from"),
        (noise() * 0.9, InputError, "images: .*got floats between integers"),
        (noise(channels=4) / 1.0, InputTypeError, "images: .*got 4 channels of float32"),
        (Image.fromarray(noise()[..., 0].astype(np.float32)), InputError, "images: .*got mode F"),
        (Image.fromarray(np.array([[-1, 3]], np.int32)), InputError, r"images: .*got mode I with values from -1 to 3"),
        (
            Image.fromarray(np.array([[0, 65536]], np.int32)),
            InputError,
            r"images: .*got mode I with values from 0 to 65536",
        ),
        (Image.new("RGB", (0, 5)), InputError, "images: .*got 0x5"),
        ([IMAGE, Image.new("La", (3, 3))], InputError, r"images\[1\]: .*got mode La"),
    ],
)
def test_not_an_image(images, error, words):
    with pytest.raises(error, match=words) as caught:
        CLIPImageProcessor()(images, return_tensors="pt")
    assert caught.type is error


def test_half_a_file():
    with pytest.raises(InputError, match=r"images\[1\]: .*got a mode RGB image that cannot be decoded") as caught:
        CLIPImageProcessor()([IMAGE, half_a_file()])
    assert isinstance(caught.value.__cause__, (OSError, SyntaxError))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            {"size": {"longest_edge": 3}},
            "size: expected {'shortest_edge': 224} or .*, got {'longest_edge': 3}",
        ),
        ({"size": {"height": 3}}, "size: .*got {'height': 3}"),
        ({"size": {}}, "size: .*got {}"),
        ({"size": "224"}, "size: .*got '224'"),
        ({"size": 0}, "size: expected integers from 1 to .*got 0"),
        ({"size": -3}, "size: .*got -3"),
        ({"size": 2.5}, "size: .*got 2.5"),
        ({"size": True}, "size: .*got True"),
        ({"size": None}, "size: .*got None"),
        ({"size": (1, 2, 3)}, "size: "),
        ({"size": 10**9}, "size: .*got 1000000000"),
        ({"size": {"shortest_edge": "3"}}, "size: "),
        ({"crop_size": {"shortest_edge": 3}}, "crop_size: "),
        ({"crop_size": 10**9}, "crop_size: "),
        ({"resample": 9}, r"resample: expected one of 0 \(nearest\), 1 \(lanczos\), .*, got 9"),
        ({"resample": "bicubic"}, "resample: expected .*, got 'bicubic'"),
        ({"resample": True}, "resample: expected .*, got True"),
        ({"do_resize": "no"}, "do_resize: expected True or False, got 'no'"),
        ({"do_normalize": 1}, "do_normalize: expected True or False, got 1"),
        ({"do_rescale": None}, "do_rescale: expected True or False, got None"),
        ({"image_mean": [0.5, 0.5]}, "image_mean: "),
        ({"image_mean": "0.5"}, "image_mean: "),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean: "),
        ({"image_std": [0, 1, 1]}, "image_std: "),
        ({"image_std": 0}, "image_std: "),
        ({"rescale_factor": float("inf")}, "rescale_factor: expected a finite number, got inf"),
        ({"rescale_factor": "1/255"}, "rescale_factor: expected a finite number, got '1/255'"),
        ({"sise": 3}, "sise"),
    ],
    ids=str,
)
def test_invalid_config_fields(call, words, tmp_path):
    for attempt in (lambda: CLIPImageProcessor(**call), lambda: CLIPImageProcessor()(IMAGE, **call)):
        with pytest.raises(InputError, match=words):
            attempt()
    if "sise" not in call:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(call))
        with pytest.raises(CheckpointError, match=f"{words}|not a finite number"):  # JSON has no NaN
            CLIPImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"return_tensors": "tf"}, "return_tensors: expected .*, got 'tf'"),
        ({"input_data_format": "hwc"}, "input_data_format: expected .*, got 'hwc'"),
        (
            {"do_center_crop": False, "return_tensors": "pt"},
            r"images: .*got sizes \[.*\] \(h, w\); pass do_center_crop=True",
        ),
    ],
    ids=str,
)
def test_invalid_calls(call, words):
    with pytest.raises(InputError, match=words):
        CLIPImageProcessor()([IMAGE, IMAGE.crop((0, 0, 9, 30))], **call)


def test_another_processors_file(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    with pytest.raises(CheckpointError, match=r"image_processor_type: expected .*, got 'ViTImageProcessor'"):
        CLIPImageProcessor.from_pretrained(tmp_path)


def test_invalid_modes_and_layouts():
    with pytest.raises(InputError, match="images: expected mode RGB, got mode L; pass do_convert_rgb=True"):
        CLIPImageProcessor()(IMAGE.convert("L"), do_convert_rgb=False)
    with pytest.raises(InputError, match="images: expected 3 channels, got 1"):
        CLIPImageProcessor()(noise()[..., :1], do_convert_rgb=False)
    with pytest.raises(InputError, match="images: expected 1, 3 or 4 channels with input_data_format='channels_first'"):
        CLIPImageProcessor()(noise(), input_data_format="channels_first")
    with pytest.raises(InputError, match="pixels after resizing, got 224x13440000"):
        CLIPImageProcessor()(Image.new("RGB", (1, 60000)), do_center_crop=False)


# ---- VaeImageProcessor


def test_preprocess_and_postprocess_are_inverse():
    """For every 8-bit value."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2))
    processor = VaeImageProcessor()
    x = processor.preprocess([ramp, IMAGE.resize((16, 16))])
    assert x.shape == (2, 3, 16, 16)
    assert x.min() == -1
    assert x.max() == 1
    first, _ = processor.postprocess(x)
    assert first.tobytes() == ramp.tobytes()


def test_an_image_that_is_not_denormalised_is_unchanged():
    x = torch.stack([torch.full((3, 8, 8), -1.0), torch.zeros(3, 8, 8)])
    images = VaeImageProcessor().postprocess(x, do_denormalize=[True, False])
    assert [image.getextrema() for image in images] == [((0, 0),) * 3] * 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            {"image": torch.zeros(1, 3, 8, 8), "output_type": "jpg"},
            "output_type: expected 'pil', .*, got 'jpg'",
        ),
        ({"image": np.zeros((1, 3, 8, 8))}, "image: .*got an array of shape"),
        ({"image": torch.zeros(3, 8, 8)}, r"image: .*got a tensor of shape \(3, 8, 8\)"),
        (
            {"image": torch.zeros(2, 3, 8, 8), "do_denormalize": [True]},
            r"do_denormalize: expected a list of 2 flags, .*, got \[True\]",
        ),
        ({"image": torch.full((1, 3, 8, 8), torch.nan)}, "image: expected finite values, got NaN or infinite values"),
        ({"image": torch.full((1, 3, 8, 8), torch.inf)}, "image: expected finite values, got NaN or infinite values"),
        ({"image": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, r"got values of torch\.uint8"),
        (
            {"image": torch.zeros(1, 3, 8, 8), "do_denormalize": True},
            "do_denormalize: expected a list of 1 flags, .*, got True",
        ),
        (
            {"image": torch.full((1, 3, 8, 8), -0.5), "do_denormalize": [False]},
            r"images: expected values in \[0, 1\], got -0\.5 to -0\.5",
        ),
        ({"image": torch.zeros(1, 4, 8, 8)}, r"got a tensor of shape \(1, 4, 8, 8\)"),
    ],
)
def test_invalid_postprocess_arguments(call, words):
    with pytest.raises(InputError, match=words):
        VaeImageProcessor().postprocess(**call)


def test_numpy_to_pil_needs_floats():
    with pytest.raises(InputTypeError, match="got values of uint8"):
        numpy_to_pil(noise())


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (None, "image: expected a PIL image, .*, got NoneType"),
        ([], "image: .*got an empty list"),
        ("x.png", "image: .*got str"),
        ([IMAGE, "x.png"], "image: .*got Image, str"),
        (noise(), "got values of torch.uint8"),
        (torch.full((3, 8, 8), torch.nan), r"image: .*got nan to nan"),
        (noise() / 1.0, r"image: .*got 0 to 255"),
        (torch.zeros(8, 8), r"image: .*got a tensor of shape \(8, 8\)"),
        (IMAGE.convert("P"), r"image\[0\]: .*got mode P"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)], "image: expected one shape .*, got shapes"),
        (IMAGE.resize((5, 30)), "width: expected an integer from 8 to 32768, got 5"),
    ],
)
def test_invalid_preprocess_arguments(image, words):
    with pytest.raises(InputError, match=words):
        VaeImageProcessor().preprocess(image)


@pytest.mark.parametrize("height", [0, -64, 7, 64.0, "64", True])
def test_invalid_heights(height):
    with pytest.raises(InputError, match="height: expected an integer from 8 to 32768, got"):
        VaeImageProcessor().preprocess(IMAGE, height=height)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_binarize": True},
        {"reducing_gap": 2},
        {"resample": "area"},
        {"vae_scale_factor": 0},
        {"vae_scale_factor": 8.0},
        {"vae_scale": 8},
    ],
    ids=str,
)
def test_invalid_vae_config_fields(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        VaeImageProcessor(**settings)


SETTINGS = [
    {},
    {"resample": 2},
    {"resample": 4},
    {"resample": 1},
    {"do_center_crop": False},
    {"do_rescale": False},
    {"size": {"height": 100, "width": 300}},
    {"crop_size": {"height": 300, "width": 250}},
    {"do_normalize": False},
    {"do_resize": False},
    {"size": {"shortest_edge": 64}, "image_std": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [(512, 512), (64, 64), (512, 768), (1024, 320), (224, 224), (8, 200), (225, 223)])
def test_preprocessing_on_a_device_equals_pillow(settings, size):
    """To the bit. On the CPU `preprocess_uint8` uses Pillow itself."""
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processor = CLIPImageProcessor(**settings)
    pil_images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    expected = processor(pil_images, return_tensors="pt").pixel_values
    for out in [processor.preprocess_uint8(images)] + clip_tensor.supports(images, processor.config) * [
        clip_tensor.preprocess_batch(images, processor.config)
    ]:
        assert out.dtype == expected.dtype
        assert torch.equal(out, expected)
    assert clip_tensor.supports(images, processor.config) == (settings.get("resample") != 1)


def test_the_order_of_pillows_axes_is_measured(monkeypatch):
    calls = []
    monkeypatch.setattr(
        clip_tensor.Image.Image,
        "resize",
        lambda self, size, resample, real=Image.Image.resize: (
            calls.append(size) or real(self, (size[0], size[1]), resample).rotate(180)
        ),
    )
    clip_tensor.rows_first.cache_clear()
    try:
        assert clip_tensor.rows_first(50, 40, 30, 20, 3) is None  # a Pillow whose output matches neither order
        assert not clip_tensor.supports(torch.zeros(1, 3, 50, 40, dtype=torch.uint8), CLIPImageProcessor().config)
    finally:
        clip_tensor.rows_first.cache_clear()
    assert calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_to_uint8_equals_numpy_to_pil(dtype):
    x = torch.rand(2, 3, 9, 7).to(dtype)
    out = to_uint8(x)
    assert out.dtype == torch.uint8
    expected = numpy_to_pil(x.permute(0, 2, 3, 1).float().numpy())
    assert np.array_equal(out.permute(0, 2, 3, 1).numpy(), np.stack([np.asarray(image) for image in expected]))
