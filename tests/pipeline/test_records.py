"""Records: all that changes a pixel changes them, equal calls have equal ones, and nothing private is in them."""

import copy
import inspect
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from imvar import (
    DDIMScheduler,
    InputError,
    Region,
    StableDiffusionImageVariationPipeline,
    UNet2DConditionModel,
    augment,
    load_image,
    load_image_embeds,
    mix,
    replace_layers,
    save_image_embeds,
    set_attend,
    slerp,
)
from imvar.kernels.int8_kernels import has_int8_kernels
from imvar.records.files import read_record
from imvar.records.record import differences
from imvar.records.schema import check_record
from tests.conftest import PHOTOS
from tests.support.lora import random_lora

BASE = {"num_inference_steps": 4, "guidance_scale": 3, "seed": 7}
WITH_MASK = {"init_image": Image.new("RGB", (64, 64), "red"), "mask_image": Image.linear_gradient("L")}


@pytest.fixture
def loaded(checkpoint):
    pipe = StableDiffusionImageVariationPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeds(seed):
    return torch.randn(1, 1, 24, generator=torch.Generator().manual_seed(seed))


def black(*_):
    """A callback."""


CHANGES = {  # by argument, two sets of arguments that differ by it
    "image": ({}, {"image": Image.new("RGB", (40, 40), "blue")}),
    "height": ({}, {"height": 64}),
    "width": ({}, {"width": 64}),
    "num_inference_steps": ({}, {"num_inference_steps": 5}),
    "guidance_scale": ({}, {"guidance_scale": 7.5}),
    "num_images_per_prompt": ({}, {"num_images_per_prompt": 2}),
    "eta": ({}, {"eta": 0.5}),
    "generator": ({"seed": None}, {"seed": None, "generator": torch.Generator().manual_seed(0)}),
    "latents": (
        {"seed": None, "latents": torch.zeros(1, 4, 16, 16)},
        {"seed": None, "latents": torch.ones(1, 4, 16, 16)},
    ),
    "callback": ({}, {"callback": black}),
    "guidance_interval": ({}, {"guidance_interval": (0.0, 0.5)}),
    "cache_interval": ({}, {"cache_interval": 2}),
    "seed": ({}, {"seed": 8}),
    "on_flagged": ({}, {"on_flagged": "keep"}),
    "image_embeds": ({"image": None, "image_embeds": embeds(0)}, {"image": None, "image_embeds": embeds(1)}),
    "negative_image_embeds": ({}, {"negative_image_embeds": embeds(0)}),
    "guidance_rescale": ({}, {"guidance_rescale": 0.5}),
    "init_image": (WITH_MASK, WITH_MASK | {"init_image": Image.new("RGB", (64, 64), "green")}),
    "strength": (WITH_MASK, WITH_MASK | {"strength": 0.6}),
    "mask_image": (WITH_MASK, WITH_MASK | {"mask_image": Image.new("L", (9, 9), 255)}),
    "paste": (WITH_MASK, WITH_MASK | {"paste": True}),
    "callback_on_step_end": ({}, {"callback_on_step_end": lambda *_: {}}),
}
WITHOUT_EFFECT = {
    "output_type",
    "return_dict",
    "callback_steps",  # with a callback, which is a reason
    "callback_on_step_end_tensor_inputs",
    "conditions",  # see test_conditions
}


def record_of(pipe, photo, **options):
    return pipe.records(**({"image": photo} | BASE | options))[0]


def differ(a, b):
    return differences(a, b) or a["reasons"] != b["reasons"]


def test_every_argument_is_covered():
    signature = inspect.signature(StableDiffusionImageVariationPipeline.__call__)
    assert CHANGES.keys() | WITHOUT_EFFECT == signature.parameters.keys() - {"self"}


@pytest.mark.parametrize("argument", CHANGES)
def test_an_argument_that_changes_pixels_changes_the_record(pipe, photo, argument):
    before, after = (record_of(pipe, photo, **options) for options in CHANGES[argument])
    assert differ(before, after)
    assert not differ(before, record_of(pipe, photo, **CHANGES[argument][0]))


def test_embeddings_have_the_photos_they_were_computed_from(loaded, photo, tmp_path):
    names = []
    for name in ("fox.png", "panda.png"):
        photo.rotate(len(names)).save(tmp_path / name)
        names.append(load_image(tmp_path / name))
    fox, panda = map(loaded.encode_image, names)
    save_image_embeds(tmp_path / "kept.safetensors", fox)
    kept = load_image_embeds(tmp_path / "kept.safetensors")

    def inputs(embeds, **options):
        return record_of(loaded, None, image_embeds=embeds, **options)["inputs"]

    def named(embeds, *operation):
        return [(entry["role"], entry["name"], *map(entry.get, operation)) for entry in inputs(embeds)]

    assert inputs(fox) == record_of(loaded, names[0])["inputs"]
    assert named(mix([(fox, 0.7), (panda, 0.3)]), "weight") == [("image", "fox.png", 0.7), ("image", "panda.png", 0.3)]
    assert named(slerp(fox, panda, 0.25), "slerp") == [("image", "fox.png", 0.25), ("image", "panda.png", 0.25)]
    assert named(augment(fox, 0.5, seed=3), "augment") == [("image", "fox.png", [0.5, 3])]
    assert named(kept) == [("image_embeds", "kept.safetensors")]
    assert inputs(panda, negative_image_embeds=fox)[1] == inputs(fox)[0] | {"role": "negative"}
    regions = [Region(fox), Region(panda, mask=left_half())]
    assert named(regions) == [("region", "fox.png"), ("region", "panda.png")]
    nested = mix([(mix([(fox, 0.5), (panda, 0.5)]), 1), (fox, 0.1)])
    for unknown in (fox + 0, fox.double(), torch.cat([fox, panda])[:1], nested):
        assert named(unknown) == [("image_embeds", None)]
    fox *= 2
    assert named(fox) == [("image_embeds", None)]
    add_one(loaded.image_encoder.visual_projection.weight)
    assert named(panda) == [("image_embeds", None)]


def left_half():
    return torch.cat([torch.ones(4, 2), torch.zeros(4, 2)], dim=1)


@pytest.mark.parametrize(
    "regions",
    [
        [Region(embeds(0)), Region(embeds(2), mask=left_half())],
        [Region(embeds(0)), Region(embeds(1), mask=1 - left_half())],
        [Region(embeds(0)), Region(embeds(1), mask=left_half(), scale=0.5)],
    ],
)
def test_regions(pipe, photo, regions):
    first = [Region(embeds(0)), Region(embeds(1), mask=left_half())]
    records = [record_of(pipe, photo, image=None, image_embeds=each) for each in (first, regions)]
    assert differences(*records)
    assert [entry["role"] for entry in records[0]["inputs"]] == ["region", "region"]


def add_one(weight):
    with torch.no_grad():
        weight += 1


SWITCHES = {
    "scheduler": lambda pipe: setattr(pipe, "scheduler", DDIMScheduler.from_config(pipe.scheduler.config)),
    "scheduler's config": lambda pipe: pipe.scheduler.register_to_config(beta_end=0.02),
    "vae's config": lambda pipe: pipe.vae.register_to_config(scaling_factor=0.2),
    "feature extractor": lambda pipe: pipe.feature_extractor.register_to_config(do_center_crop=False),
    "safety checker": lambda pipe: setattr(pipe, "safety_checker", None),
    "FreeU": lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "slicing": lambda pipe: pipe.enable_vae_slicing(),
    "tiling": lambda pipe: pipe.enable_vae_tiling(),
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "attention backend": lambda pipe: pipe.enable_xformers_memory_efficient_attention(),
    "attention kernel": lambda pipe: set_attend(pipe.unet, lambda q, k, v: v.mean(2, keepdim=True).expand_as(q)),
    "channels_last": lambda pipe: pipe.to(memory_format=torch.channels_last),
    "fp8": lambda pipe: pipe.enable_fp8(),
    "compile": lambda pipe: pipe.compile(backend="eager"),
    "CUDA graphs": lambda pipe: pipe.compile(backend="cudagraphs"),
    "offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu:0"),
    "dtype": lambda pipe: pipe.to(torch.bfloat16),
    "a hook": lambda pipe: pipe.unet.conv_out.register_forward_hook(lambda *_: None),
    "a layer": lambda pipe: replace_layers(pipe.unet, torch.nn.SiLU, lambda layer: torch.nn.ReLU()),
    "a weight": lambda pipe: add_one(pipe.vae.decoder.conv_in.weight),
    "its own method": lambda pipe: setattr(pipe, "decode", pipe.decode),
    "a method of the scheduler": lambda pipe: setattr(pipe.scheduler, "step", pipe.scheduler.step),
    "threads": lambda _: torch.set_num_threads(2),
    "deterministic": lambda _: torch.use_deterministic_algorithms(True),
    "SDPA's backends": lambda _: torch.backends.cuda.enable_flash_sdp(False),
    "padding": lambda pipe: setattr(pipe.unet.conv_in, "padding_mode", "circular"),
    "heads": lambda pipe: setattr(next(m for m in pipe.unet.modules() if hasattr(m, "heads")), "heads", 1),
    "eps": lambda pipe: setattr(pipe.unet.conv_norm_out, "eps", 1e-2),
    "the scheduler's tables": lambda pipe: pipe.scheduler.alphas_cumprod.mul_(0.9),
    "the scheduler's last alpha": lambda pipe: setattr(pipe.scheduler, "final_alpha_cumprod", torch.tensor(0.5)),
    "initial noise": lambda pipe: setattr(pipe.scheduler, "init_noise_sigma", 2.0),
    "matmul precision": lambda _: torch.set_float32_matmul_precision("medium"),
}
if has_int8_kernels():
    SWITCHES["int8"] = lambda pipe: pipe.enable_int8()


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.filterwarnings("ignore")
def test_a_switch_changes_the_record(loaded, photo, switch, request):
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    request.addfinalizer(lambda: torch.backends.cuda.enable_flash_sdp(True))
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    before = record_of(loaded, photo)
    SWITCHES[switch](loaded)
    assert differ(before, record_of(loaded, photo))


def test_a_call_has_the_records_that_were_announced(loaded, photo):
    arguments = {"image": [photo, photo.rotate(90)], "num_images_per_prompt": 2} | BASE
    made, announced = loaded(**arguments), loaded.records(**arguments)
    assert [differences(a, b) for a, b in zip(made.records, announced, strict=True)] == [[]] * 4
    assert made.records == [record | {"flagged": False} for record in announced]
    assert [record["seed"] for record in announced] == [7, 8, 9, 10]
    assert [record["call"]["image"] for record in announced] == [0, 0, 1, 1]
    assert all(record["exact"] for record in announced), announced[0]["reasons"]


def test_a_progress_bar_of_the_callers_changes_nothing(loaded, photo):
    loaded.progress_bar = loaded.progress_bar
    assert record_of(loaded, photo)["exact"]


def test_arguments_are_checked_as_in_a_call(pipe, photo):
    for arguments in ({"guidance_scale": -1}, {"height": 13}, {"seed": "x"}, {"strength": 0.5}):
        with pytest.raises(InputError) as of_records:
            pipe.records(photo, **arguments)
        with pytest.raises(InputError) as of_call:
            pipe(photo, **arguments)
        assert str(of_records.value) == str(of_call.value)


def test_a_record_is_json_without_paths(loaded, photo, tmp_path, checkpoint):
    file = tmp_path / "a fox.png"
    photo.save(file)
    start = Image.open(file)
    record = record_of(loaded, load_image(file), init_image=start)
    check_record(record, "record")
    text = json.dumps(record, allow_nan=False)
    assert json.loads(text) == record
    for path in (tmp_path, checkpoint):
        assert str(path) not in text
        assert str(path.parent) not in text
    image, init = record["inputs"]
    assert (image["name"], init["name"]) == ("a fox.png", "a fox.png")
    assert record["checkpoint"]["name"] == checkpoint.name


def test_saving_never_replaces_a_file_silently(loaded, photo, tmp_path):
    made = loaded(load_image(PHOTOS / "chelsea.jpg"), num_images_per_prompt=2, **BASE)
    first, second = made.save(tmp_path), made.save(tmp_path)
    assert [path.name for path in first + second] == [
        "chelsea-7.png",
        "chelsea-8.png",
        "chelsea-7-2.png",
        "chelsea-8-2.png",
    ]
    assert made.save(tmp_path, overwrite=True) == first
    assert [read_record(path) for path in first] == made.records
    (plain,) = loaded(photo, **BASE).save(tmp_path, metadata=False)
    assert plain.name == "image-7.png"
    with pytest.raises(InputError, match="a record"):
        read_record(plain)


def test_images_keep_their_records(loaded, photo, tmp_path):
    made = loaded(photo, num_images_per_prompt=3, **BASE)
    other = loaded(photo, **BASE)
    records, images = made.records, made.images
    made.images = images[::-1]
    assert [path.name for path in made.save(tmp_path)] == ["image-9.png", "image-8.png", "image-7.png"]
    made.images = images[1:2]
    (path,) = made.save(tmp_path / "one")
    assert read_record(path) == records[1]
    made.images = [image.copy() for image in images]  # edited, say
    assert [read_record(path) for path in made.save(tmp_path / "copies")] == records
    for wrong in ([images[0].copy()], [image.resize((8, 8)) for image in images], other.images):
        made.images = wrong
        with pytest.raises(InputError, match="images: expected the images of the call, got another one"):
            made.save(tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_autocast_is_a_reason(loaded, photo):
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast: torch.autocast is on" in record_of(loaded, photo)["reasons"]


def test_a_safety_checker_without_a_config_is_recorded(loaded, photo):
    checker = loaded.safety_checker
    loaded.safety_checker = lambda images, clip_input: checker(images=images, clip_input=clip_input)
    loaded.safety_checker.config = None
    record = record_of(loaded, photo)
    assert record["pipeline"]["components"]["safety_checker"]["class"] == "function"
    assert "safety_checker: function is a custom class" in record["reasons"]


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
@pytest.mark.parametrize("format", ["png", "webp"])
def test_every_type_of_output_is_saved(pipe, photo, tmp_path, kind, format):
    (path,) = pipe(photo, output_type=kind, **BASE).save(tmp_path, format=format)
    (expected,) = pipe(photo, **BASE).images
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(expected))


def test_latents_are_not_saved(pipe, photo, tmp_path):
    made = pipe(photo, output_type="latent", **BASE)
    assert made.records is None
    with pytest.raises(InputError, match="output_type='pil'"):
        made.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def checkpoint_entry(pipe, photo):
    return record_of(pipe, photo)["checkpoint"]


def test_weights_have_a_digest_until_they_change(loaded, photo):
    digest = checkpoint_entry(loaded, photo)["weights"]
    assert digest.startswith("sha256:")
    loaded(photo, **BASE)
    loaded.to("cpu").to(memory_format=torch.channels_last)
    assert checkpoint_entry(loaded, photo)["weights"] == digest
    loaded.to(torch.bfloat16)
    assert checkpoint_entry(loaded, photo)["weights"] == digest
    loaded.to(torch.float32)
    assert checkpoint_entry(loaded, photo)["weights"] == "changed"  # rounded to bfloat16
    loaded.to(torch.bfloat16)
    assert checkpoint_entry(loaded, photo)["weights"] == digest
    add_one(loaded.unet.conv_in.weight)
    record = record_of(loaded, photo)
    assert record["checkpoint"]["weights"] == "changed"
    assert record["reasons"] == ["unet: its weights or layers were changed after they were loaded"]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_have_the_same_origin(loaded, photo, copied):
    same = copied(loaded)
    assert checkpoint_entry(same, photo) == checkpoint_entry(loaded, photo)
    add_one(same.unet.conv_in.weight)
    assert checkpoint_entry(same, photo)["weights"] == "changed"
    assert checkpoint_entry(copied(same), photo)["weights"] == "changed"


def test_random_weights_have_no_digest(pipe, photo):
    record = record_of(pipe, photo)
    assert record["checkpoint"]["weights"] is None
    assert "unet: its weights are not from a file" in record["reasons"]


def test_a_component_of_another_checkpoint_has_its_own_entry(loaded, photo, folder):
    loaded.unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    entry = checkpoint_entry(loaded, photo)
    assert entry["name"] == "checkpoint"
    folder.rename(folder.with_name("mine"))
    loaded.unet = UNet2DConditionModel.from_pretrained(folder.with_name("mine"), subfolder="unet")
    entry = checkpoint_entry(loaded, photo)
    assert (entry["name"], entry["others"]["vae"]["name"]) == ("mine", "checkpoint0")


def test_files_that_changed_since_have_no_digest(photo, folder):
    pipe = StableDiffusionImageVariationPipeline.from_pretrained(folder)
    pipe.unet.save_pretrained(folder / "unet")
    record = record_of(pipe, photo)
    assert record["checkpoint"]["weights"] is None
    assert not record["exact"]


class Proxy:
    """A scheduler of other code, which may have anything instead of a config."""

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def __getattr__(self, name):
        if name == "config":
            raise RuntimeError("no config")
        return getattr(vars(self)["scheduler"], name)


def test_a_third_party_component_is_a_reason_and_no_error(loaded, photo):
    loaded.scheduler = Proxy(loaded.scheduler)
    made = loaded(photo, **BASE)
    assert "scheduler: Proxy is a custom class" in made.records[0]["reasons"]
    assert "scheduler: could not be recorded (RuntimeError)" in made.records[0]["reasons"]


class FromText(StableDiffusionImageVariationPipeline):
    """A pipeline whose images are text."""

    def _encode_image(self, image, device, n, guided, weight=1.0, path=""):
        return torch.full(((1 + guided) * len(image) * n, 1, 24), weight)


def test_a_custom_pipeline_is_recorded_as_such(loaded):
    pipe = FromText(**loaded.components)
    record = record_of(pipe, ["a fox", "a panda"], conditions={"weight": 0.5, "path": "/home/me/secret"})
    assert record["settings"]["conditions"]["weight"] == 0.5
    assert "secret" not in json.dumps(record)
    assert record["reasons"] == [
        "conditions: of a custom pipeline",
        "pipeline: FromText is a custom class",
        "image: its pixels could not be recorded (TypeError)",
    ]
    assert differences(record, record_of(pipe, ["a fox", "a panda"], conditions={"weight": 1}))


@pytest.mark.filterwarnings("error")
def test_arrays_are_recorded(loaded, photo):
    start = np.asarray(photo.resize((64, 64))) / np.float32(255)
    start.flags.writeable = False
    first, again, other = (record_of(loaded, photo, init_image=x) for x in (start, start.copy(), start / 2))
    assert first["exact"]
    assert not differences(first, again)
    assert differences(first, other)


def test_adapters_are_recorded(loaded, photo):
    loaded.load_lora_weights(random_lora(loaded.unet, where="attn1"), adapter_name="style", weight=0.5)
    record = record_of(loaded, photo)
    assert (record["pipeline"]["lora"], record["checkpoint"]["weights"]) == ({"style": 0.5}, "changed")


def test_an_interrupted_call_says_so(loaded, photo):
    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return {}

    made = loaded(photo, callback_on_step_end=interrupt, **BASE)
    assert "the call was interrupted" in made.records[0]["reasons"]
