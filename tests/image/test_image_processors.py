"""Pictures to pixels and back: what must hold without the reference, and what must be refused."""

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


def levels(image, **call):
    return PLAIN(image, return_tensors="np", **call).pixel_values[0].transpose(1, 2, 0)


# ---- what holds


def test_values():
    pixels = CLIPImageProcessor()(Image.new("RGB", (300, 260), (255, 0, 51)), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 224, 224)
    assert pixels.dtype == torch.float32
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    assert torch.equal(pixels, expected[None, :, None, None].expand_as(pixels))


def test_a_batch_is_its_pictures():
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


def test_nothing_handed_in_is_changed():
    image, array, settings = Image.fromarray(noise(channels=4)), noise(), {"shortest_edge": 20}
    before = image.mode, image.tobytes()
    processor = CLIPImageProcessor(size=settings)
    settings["shortest_edge"] = 7
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
    assert levels(image)[0].tolist() == [[v] * 3 for v in (0, 0, 1, 1, 4, 128, 255)]


def test_a_16_bit_file_looks_like_its_8_bit_self(tmp_path):
    grey = noise(channels=1)[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(levels(Image.open(tmp_path / "deep.png")), levels(Image.fromarray(grey)))


def test_mode_i_is_8_bit_up_to_255_and_16_bit_above():
    assert levels(Image.fromarray(np.array([[0, 255]], np.int32)))[0, :, 0].tolist() == [0, 255]
    assert levels(Image.fromarray(np.array([[0, 255, 65535]], np.int32)))[0, :, 0].tolist() == [0, 1, 255]


def test_an_extreme_picture_takes_little_memory():
    """Whole, it would be 224 x 13,440,000 pixels: 12 GB."""
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


def test_settings_are_attributes():
    processor = CLIPImageProcessor(size=224, crop_size=[224, 200])
    assert processor.size == {"shortest_edge": 224}
    assert processor.crop_size == {"height": 224, "width": 200}
    assert processor.image_mean == CLIP_MEAN
    processor.size = 32
    assert processor.config.size == {"shortest_edge": 32}
    with pytest.raises(InputError, match="size=0"):
        processor.size = 0
    assert processor.size == {"shortest_edge": 32}
    with pytest.raises(AttributeError, match="no attribute or setting 'sise'"):
        _ = processor.sise


def test_copies():
    processor = CLIPImageProcessor(size=20, crop_size=18)
    for twin in (copy.copy(processor), copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert twin.config.to_dict() == processor.config.to_dict()
        twin.size = 30
        assert processor.size == {"shortest_edge": 20}


def test_files_keep_what_they_do_not_know(tmp_path):
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


# ---- what is refused

HALF = io.BytesIO()
IMAGE.save(HALF, "PNG")


def half_a_file():
    return Image.open(io.BytesIO(HALF.getvalue()[:900]))


NAN = np.full((30, 40, 3), np.nan, np.float32)


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (None, InputTypeError, "images: NoneType came"),
        ("photo.png", InputTypeError, "images: str came; a PIL picture, .*open files"),
        (b"\x89PNG", InputTypeError, "images: bytes came"),
        (io.BytesIO(), InputTypeError, "images: BytesIO came"),
        (True, InputTypeError, "images: bool came"),
        (3.5, InputTypeError, "images: float came"),
        ([], InputTypeError, "images: an empty list came"),
        ((), InputTypeError, "images: an empty tuple came"),
        ([IMAGE, None], InputTypeError, r"images\[1\]: NoneType came"),
        ([IMAGE, IMAGE, "http://x/y.png"], InputTypeError, r"images\[2\]: str came"),
        ([[IMAGE]], InputTypeError, r"images\[0\]: list came"),
        ({"a": IMAGE}, InputTypeError, "images: dict came"),
        (noise()[..., 0], InputError, r"images: shape \(30, 40\) came; \(h, w, 3\)"),
        ([IMAGE, noise()[..., :2]], InputError, r"images\[1\]: shape \(30, 40, 2\) has no axis"),
        (noise()[:3], InputError, r"images: shape \(3, 40, 3\) can be read two ways; say input_data_format="),
        (np.zeros((0, 5, 3), np.uint8), InputError, r"images: shape \(0, 5, 3\) came"),
        (np.zeros((0, 5, 5, 3), np.uint8), InputError, r"images: an empty batch of shape \(0, 5, 5, 3\)"),
        (np.zeros((1, 1, 5, 5, 3), np.uint8), InputError, r"images: shape \(1, 1, 5, 5, 3\) came"),
        (noise() > 9, InputTypeError, "images: values of type bool came"),
        (noise().astype(complex), InputTypeError, "images: values of type complex128 came"),
        (noise().astype(object), InputTypeError, "images: values of type object came"),
        (noise().astype(np.uint16) * 257, InputError, r"images: whole numbers \d+\.\.65535 came; 0\.\.255"),
        (noise().astype(np.int16) - 128, InputError, r"images: whole numbers -128\.\."),
        (NAN, InputError, "images: NaN or infinite"),
        (torch.from_numpy(NAN), InputError, "images: NaN or infinite"),
        ([np.stack([noise() / 1.0, NAN])], InputError, r"images\[0\]\[1\]: NaN or infinite"),
        (noise() / 255, InputError, r"images: floats 0\.0\.\.1\.0 came; .* do_rescale=False"),
        (noise() / 127.5 - 1, InputError, r"images: floats -1\.0\.\."),
        (noise() + 0.3, InputError, r"images: floats .* came; 0\.\.255 would do"),
        (noise() * 0.9, InputError, "images: floats between whole numbers"),
        (noise(channels=4) / 1.0, InputTypeError, "images: 4 channels of float32"),
        (Image.fromarray(noise()[..., 0].astype(np.float32)), InputError, "images: mode F"),
        (Image.fromarray(np.array([[-1, 3]], np.int32)), InputError, r"images: mode I with values -1\.\.3"),
        (Image.fromarray(np.array([[0, 65536]], np.int32)), InputError, r"images: mode I with values 0\.\.65536"),
        (Image.new("RGB", (0, 5)), InputError, "images: a picture of 0x5"),
        ([IMAGE, Image.new("La", (3, 3))], InputError, r"images\[1\]: a mode La picture"),
    ],
)
def test_no_picture(images, error, words):
    with pytest.raises(error, match=words) as caught:
        CLIPImageProcessor()(images, return_tensors="pt")
    assert caught.type is error


def test_half_a_file():
    with pytest.raises(InputError, match=r"images\[1\]: a mode RGB picture came that cannot be read") as caught:
        CLIPImageProcessor()([IMAGE, half_a_file()])
    assert isinstance(caught.value.__cause__, (OSError, SyntaxError))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            {"size": {"longest_edge": 3}},
            "size={'longest_edge': 3} is not supported; it can be {'shortest_edge': 224} or",
        ),
        ({"size": {"height": 3}}, "size="),
        ({"size": {}}, "size="),
        ({"size": "224"}, "size='224'"),
        ({"size": 0}, "size=0"),
        ({"size": -3}, "size=-3"),
        ({"size": 2.5}, "size=2.5"),
        ({"size": True}, "size=True"),
        ({"size": None}, "size=None"),
        ({"size": (1, 2, 3)}, "size="),
        ({"size": 10**9}, "size=1000000000"),
        ({"size": {"shortest_edge": "3"}}, "size="),
        ({"crop_size": {"shortest_edge": 3}}, "crop_size="),
        ({"crop_size": 10**9}, "crop_size="),
        ({"resample": 9}, r"resample=9 is not supported; it can be 0 \(nearest\), 1 \(lanczos\)"),
        ({"resample": "bicubic"}, "resample='bicubic'"),
        ({"resample": True}, "resample=True"),
        ({"do_resize": "no"}, "do_resize='no'"),
        ({"do_normalize": 1}, "do_normalize=1"),
        ({"do_rescale": None}, "do_rescale=None"),
        ({"image_mean": [0.5, 0.5]}, "image_mean="),
        ({"image_mean": "0.5"}, "image_mean="),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean="),
        ({"image_std": [0, 1, 1]}, "image_std="),
        ({"image_std": 0}, "image_std="),
        ({"rescale_factor": float("inf")}, "rescale_factor=inf"),
        ({"rescale_factor": "1/255"}, "rescale_factor="),
        ({"sise": 3}, "unexpected argument 'sise'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(call, words, tmp_path):
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
        ({"return_tensors": "tf"}, "return_tensors='tf'"),
        ({"input_data_format": "hwc"}, "input_data_format='hwc'"),
        ({"do_center_crop": False, "return_tensors": "pt"}, r"images: sizes \[.*\] \(h, w\) make no batch"),
    ],
    ids=str,
)
def test_calls_that_cannot_be(call, words):
    with pytest.raises(InputError, match=words):
        CLIPImageProcessor()([IMAGE, IMAGE.crop((0, 0, 9, 30))], **call)


def test_another_processors_file(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    with pytest.raises(CheckpointError, match="image_processor_type='ViTImageProcessor'"):
        CLIPImageProcessor.from_pretrained(tmp_path)


def test_bands_and_layouts_that_cannot_be():
    with pytest.raises(InputError, match="mode L came; RGB would do, or do_convert_rgb=True"):
        CLIPImageProcessor()(IMAGE.convert("L"), do_convert_rgb=False)
    with pytest.raises(InputError, match="1 channels came"):
        CLIPImageProcessor()(noise()[..., :1], do_convert_rgb=False)
    with pytest.raises(InputError, match="no axis"):
        CLIPImageProcessor()(noise(), input_data_format="channels_first")
    with pytest.raises(InputError, match="would become 224x13440000 pixels"):
        CLIPImageProcessor()(Image.new("RGB", (1, 60000)), do_center_crop=False)


# ---- VaeImageProcessor


def test_there_and_back():
    """Every 8-bit picture survives the way into the autoencoder's range and out again."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2))
    processor = VaeImageProcessor()
    x = processor.preprocess([ramp, IMAGE.resize((16, 16))])
    assert x.shape == (2, 3, 16, 16)
    assert x.min() == -1
    assert x.max() == 1
    first, _ = processor.postprocess(x)
    assert first.tobytes() == ramp.tobytes()


def test_a_flagged_picture_is_handed_on():
    x = torch.stack([torch.full((3, 8, 8), -1.0), torch.zeros(3, 8, 8)])
    images = VaeImageProcessor().postprocess(x, do_denormalize=[True, False])
    assert [image.getextrema() for image in images] == [((0, 0),) * 3] * 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            {"image": torch.zeros(1, 3, 8, 8), "output_type": "jpg"},
            "output_type='jpg' is not supported; it can be 'pil'",
        ),
        ({"image": np.zeros((1, 3, 8, 8))}, "image: ndarray came"),
        ({"image": torch.zeros(3, 8, 8)}, r"image: shape \(3, 8, 8\) came"),
        ({"image": torch.zeros(2, 3, 8, 8), "do_denormalize": [True]}, r"do_denormalize=\[True\] came for 2 pictures"),
        ({"image": torch.full((1, 3, 8, 8), torch.nan)}, "NaN or infinite values came"),
        ({"image": torch.full((1, 3, 8, 8), torch.inf)}, "NaN or infinite values came"),
        ({"image": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, r"values of torch\.uint8 came"),
        ({"image": torch.zeros(1, 3, 8, 8), "do_denormalize": True}, "do_denormalize=True came for 1 pictures"),
        ({"image": torch.full((1, 3, 8, 8), -0.5), "do_denormalize": [False]}, r"values -0\.5\.\.-0\.5 came"),
        ({"image": torch.zeros(1, 4, 8, 8)}, r"shape \(1, 4, 8, 8\) came"),
    ],
)
def test_no_picture_comes_of_it(call, words):
    with pytest.raises(InputError, match=words):
        VaeImageProcessor().postprocess(**call)


def test_numpy_to_pil_needs_floats():
    with pytest.raises(InputTypeError, match="values of type uint8 came"):
        numpy_to_pil(noise())


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (None, "image: NoneType came"),
        ([], "image: an empty list came"),
        ("x.png", "image: str came"),
        ([IMAGE, "x.png"], "image: Image, str came"),
        (noise(), "values of torch.uint8 came"),
        (torch.full((3, 8, 8), torch.nan), r"image: values nan\.\.nan came"),
        (noise() / 1.0, r"image: values 0\.\.255 came"),
        (torch.zeros(8, 8), r"image: shape \(8, 8\) came"),
        (IMAGE.convert("P"), r"image\[0\]: mode P came"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)], "image: shapes"),
        (IMAGE.resize((5, 30)), "width=5: a whole number from 8"),
    ],
)
def test_nothing_to_preprocess(image, words):
    with pytest.raises(InputError, match=words):
        VaeImageProcessor().preprocess(image)


@pytest.mark.parametrize("height", [0, -64, 7, 64.0, "64", True])
def test_heights_that_cannot_be(height):
    with pytest.raises(InputError, match=r"height=.*: a whole number from 8 to 32768"):
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
def test_vae_settings_that_cannot_be(settings):
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
def test_pictures_on_a_device_are_prepared_as_by_pillow(settings, size):
    """To the bit. On the CPU `preprocess_uint8` asks Pillow itself."""
    levels = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processor = CLIPImageProcessor(**settings)
    pictures = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in levels]
    expected = processor(pictures, return_tensors="pt").pixel_values
    for made in [processor.preprocess_uint8(levels)] + clip_tensor.supports(levels, processor.config) * [
        clip_tensor.preprocess_batch(levels, processor.config)
    ]:
        assert made.dtype == expected.dtype
        assert torch.equal(made, expected)
    assert clip_tensor.supports(levels, processor.config) == (settings.get("resample") != 1)


def test_which_axis_pillow_begins_with_is_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(
        clip_tensor.Image.Image,
        "resize",
        lambda self, size, resample, real=Image.Image.resize: (
            asked.append(size) or real(self, (size[0], size[1]), resample).rotate(180)
        ),
    )
    clip_tensor.rows_first.cache_clear()
    try:
        assert clip_tensor.rows_first(50, 40, 30, 20, 3) is None  # a Pillow that does something else
        assert not clip_tensor.supports(torch.zeros(1, 3, 50, 40, dtype=torch.uint8), CLIPImageProcessor().config)
    finally:
        clip_tensor.rows_first.cache_clear()
    assert asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_levels_are_those_of_numpy(dtype):
    x = torch.rand(2, 3, 9, 7).to(dtype)
    levels = to_uint8(x)
    assert levels.dtype == torch.uint8
    pictures = numpy_to_pil(x.permute(0, 2, 3, 1).float().numpy())
    assert np.array_equal(levels.permute(0, 2, 3, 1).numpy(), np.stack([np.asarray(one) for one in pictures]))
