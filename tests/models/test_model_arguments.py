"""What each part refuses when it is called on its own: at once, by the name of the argument, and what would do."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import imvar
from imvar import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    InputError,
    InputTypeError,
    LMSDiscreteScheduler,
    PNDMScheduler,
)
from imvar.noise import randn
from tests.support.random_checkpoint import PUBLISHED_SCHEDULER, tiny_pipeline

NAN, INF = float("nan"), float("inf")
PHOTO = Path(__file__).parents[1] / "photos" / "chelsea.jpg"
x, context = torch.zeros(1, 4, 16, 16), torch.zeros(1, 1, 24)
two = x.repeat(2, 1, 1, 1)
PHOTO_OF_ONE_COLOUR = Image.new("RGB", (64, 48), "red")
picture, small = torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 32, 32)


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


MODELS = {
    "sample: expected a tensor (b, 4, h, w), got a tensor of shape (1, 5, 16, 16)": lambda p: p.unet(
        torch.zeros(1, 5, 16, 16), 1, context
    ),
    "sample: expected a tensor (b, 4, h, w), got a tensor of shape (4, 16, 16)": lambda p: p.unet(x[0], 1, context),
    "sample: expected a tensor (b, 4, h, w), got NoneType": lambda p: p.unet(None, 1, context),
    "sample: expected floating-point values of 16 bits or more, got values of torch.int64": lambda p: p.unet(
        x.long(), 1, context
    ),
    "sample: expected torch.float32, the dtype of the weights, got torch.float64": lambda p: p.unet(
        x.double(), 1, context
    ),
    "encoder_hidden_states: expected a tensor (b, m, 24), got NoneType": lambda p: p.unet(x, 1, None),
    "encoder_hidden_states: expected a tensor (b, m, 24), got a tensor of shape (1, 1, 7)": lambda p: p.unet(
        x, 1, torch.zeros(1, 1, 7)
    ),
    "encoder_hidden_states: expected a tensor (b, m, 24), got a tensor of shape (1, 24)": lambda p: p.unet(
        x, 1, torch.zeros(1, 24)
    ),
    "encoder_hidden_states: expected a multiple of the 2 samples, got 3": lambda p: p.unet(
        x.repeat(2, 1, 1, 1), 1, torch.zeros(3, 1, 24)
    ),
    "timestep: expected a finite number ... got nan": lambda p: p.unet(x, NAN, context),
    "timestep: expected a finite number from 0, got -5": lambda p: p.unet(x, -5, context),
    "timestep: expected a number, or a tensor of one per sample, got '3'": lambda p: p.unet(x, "3", context),
    "timestep: expected a tensor () or (1,), one per sample, got a tensor of shape (2,)": lambda p: p.unet(
        x, torch.tensor([1, 2]), context
    ),
    "timestep: expected a finite number from 0, got nan": lambda p: p.unet(
        two, torch.tensor([1.0, NAN]), context.repeat(2, 1, 1)
    ),
    "timestep: expected a finite number from 0, got -1": lambda p: p.unet(
        two, torch.tensor([1, -1]), context.repeat(2, 1, 1)
    ),
    "timestep: expected a number, or a tensor of one per sample, got True": lambda p: p.unet(
        two, torch.tensor([True, False]), context.repeat(2, 1, 1)
    ),
    "timestep: expected real numbers, got torch.complex64": lambda p: p.unet(x, torch.tensor(1j), context),
    "timestep: expected a finite number from 0, got 9223372036854775808": lambda p: p.unet(x, 2**63, context),
    "timestep: expected a number, or a tensor of one per sample, got <an integer of 16610 bits>": lambda p: p.unet(
        x, 10**5000, context
    ),
    "timestep: expected a number, or a tensor of one per sample, got array([7, 7])": lambda p: p.unet(
        x, np.array([7, 7]), context
    ),
    "sample: expected a tensor (b, 4, h, w), got a tensor of shape (1, 4, 0, 16)": lambda p: p.unet(
        x[:, :, :0], 1, context
    ),
    "encoder_hidden_states: expected a tensor (b, m, 24), got a tensor of shape (1, 0, 24)": lambda p: p.unet(
        x, 1, context[:, :0]
    ),
    "z: expected a tensor (b, 4, h, w), got a tensor of shape (1, 4, 0, 16)": lambda p: p.vae.decode(x[:, :, :0]),
    "merge: expected a function of h, skip and the up block's index, got 1": lambda p: p.unet(x, 1, context, merge=1),
    "x: expected a tensor (b, 3, h, w), got a tensor of shape (1, 4, 64, 64)": lambda p: p.vae.encode(
        torch.zeros(1, 4, 64, 64)
    ),
    "x: expected a tensor (b, 3, h, w), got Image": lambda p: p.vae.encode(Image.new("RGB", (64, 64))),
    "x: expected images of at least 8 pixels a side, got (4, 4)": lambda p: p.vae.encode(torch.zeros(1, 3, 4, 4)),
    "z: expected a tensor (b, 4, h, w), got a tensor of shape (1, 3, 8, 8)": lambda p: p.vae.decode(
        torch.zeros(1, 3, 8, 8)
    ),
    "z: expected a tensor (b, 4, h, w), got a tensor of shape (4, 8, 8)": lambda p: p.vae.decode(x[0, :, :8, :8]),
    "z: expected torch.float32, the dtype of the weights, got torch.float16": lambda p: p.vae.decode(x.half()),
    "generator: expected a torch.Generator or a list of them, got 42": lambda p: p.vae.encode(
        picture
    ).latent_dist.sample(42),
    "pixel_values: expected a tensor (b, 3, h, w), got NoneType": lambda p: p.image_encoder(None),
    "pixel_values: expected images of size (32, 32), got (31, 32)": lambda p: p.image_encoder(small[:, :, :31]),
    "pixel_values: expected floating-point values of 16 bits or more, got values of torch.uint8": lambda p: (
        p.image_encoder(small.byte())
    ),
    "clip_input: expected a tensor (b, 3, h, w), got NoneType": lambda p: p.safety_checker(None, None),
    "images: expected 1, as many as in clip_input, got 2": lambda p: p.safety_checker(small, torch.zeros(2, 3, 8, 8)),
    "clip_input: expected images of size (32, 32), got (32, 31)": lambda p: p.safety_checker(small[..., :31], picture),
    "images: expected a tensor, an array or a list of images, got int": lambda p: p.safety_checker(small, 3),
    "images: expected a tensor, an array or a list of images, got str": lambda p: p.safety_checker(small, "x"),
}
META = {
    "sample: expected a tensor on cpu, the device of the weights, got a tensor on meta": lambda p: p.unet(
        x.to("meta"), 1, context
    ),
    "encoder_hidden_states: expected a tensor on cpu, the device of the weights, got a tensor on meta": lambda p: (
        p.unet(x, 1, context.to("meta"))
    ),
    "timestep: expected a tensor with values, got a tensor on the meta device; move it to the CPU": lambda p: p.unet(
        x, torch.tensor(1, device="meta"), context
    ),
    "x: expected a tensor on cpu, the device of the weights, got a tensor on meta": lambda p: p.vae.encode(
        picture.to("meta")
    ),
    "z: expected a tensor on cpu, the device of the weights, got a tensor on meta": lambda p: p.vae.decode(
        x.to("meta")
    ),
    "pixel_values: expected a tensor on cpu, the device of the weights, got a tensor on meta": lambda p: (
        p.image_encoder(small.to("meta"))
    ),
    "clip_input: expected a tensor on cpu, the device of the weights, got a tensor on meta": lambda p: p.safety_checker(
        small.to("meta"), picture
    ),
    "latents: expected a tensor with values, got a tensor on the meta device; move it to the CPU": lambda p: p(
        Image.open(PHOTO), latents=x.to("meta")
    ),
    "image: expected a tensor with values, got a tensor on the meta device": lambda p: p(small.to("meta")),
    "image: expected a tensor with values, got a tensor on the meta device; move it": lambda p: (
        p.image_processor.postprocess(picture.to("meta"))
    ),
    "image: expected a tensor with values, got a tensor on the meta device; move it to the CPU": lambda p: (
        p.image_processor.preprocess(picture.to("meta"))
    ),
    "components: expected weights in memory, got vae on meta": lambda p: copy.deepcopy(p).to("meta")(Image.open(PHOTO)),
    "latents: expected a dense tensor, got a torch.sparse_coo tensor": lambda p: p(
        Image.open(PHOTO), latents=x.to_sparse()
    ),
    "latents: expected a dense tensor, got a nested tensor": lambda p: p(
        Image.open(PHOTO), latents=torch.nested.nested_tensor([x[0]])
    ),
    "sample: expected a dense tensor, got a torch.sparse_coo tensor": lambda p: p.unet(x.to_sparse(), 1, context),
}
ARGUMENTS = {
    "DDIMConfig: expected arguments among num_train_timesteps, beta_ ... got too many positional arguments": lambda _: (
        DDIMScheduler(*range(30))
    ),
    "DDIMConfig: expected arguments among ... got multiple values for argument 'num_train_timesteps'": lambda _: (
        DDIMScheduler(9, num_train_timesteps=5)
    ),
    "config: expected a config or a dictionary, got NoneType": lambda _: DDIMScheduler.from_config(None),
    "config: expected a config or a dictionary, got 1": lambda _: DDIMScheduler(config=1),
    "sample_max_value: expected a number from 0 to inf, got -1": lambda _: DDIMScheduler(sample_max_value=-1),
    "DDIMConfig.beta_start: expected a finite number, got np.True_": lambda _: DDIMScheduler(beta_start=np.True_),
    "begin_index: expected an integer from 0 to 999, got -1": lambda _: LMSDiscreteScheduler().set_begin_index(-1),
    "begin_index: expected an integer from 0 to 999, got 'x'": lambda _: LMSDiscreteScheduler().set_begin_index("x"),
    "order: expected an integer >= 1, got 0": lambda _: step(LMSDiscreteScheduler, order=0),
    "order: expected an integer >= 1, got 1.5": lambda _: step(LMSDiscreteScheduler, order=1.5),
    "hidden_size: expected a multiple of num_attention_heads=4, got 30": lambda _: imvar.CLIPVisionModelWithProjection(
        hidden_size=30, num_attention_heads=4
    ),
    "class_labels: expected None, got tensor([0.]); UNet2DConditionModel does not support it": lambda p: p.unet(
        x, 1, context, class_labels=torch.zeros(1)
    ),
    "positional argument 4: expected None, got tensor([0.]); UNet2DConditionModel does not support it": lambda p: (
        p.unet(x, 1, context, torch.zeros(1))
    ),
    "block_out_channels: expected 1 to 16 widths, got 0": lambda _: imvar.AutoencoderKL(
        block_out_channels=(), down_block_types=(), up_block_types=()
    ),
    "up_block_types: expected 1 times UpDecoderBlock2D, ... got ['UpBlock2D']": lambda _: imvar.AutoencoderKL(
        up_block_types=["UpBlock2D"]
    ),
    "block_out_channels: expected multiples of norm_num_groups=32, got 30": lambda _: imvar.AutoencoderKL(
        block_out_channels=(30,)
    ),
    "image_mean: expected a finite number or 3, got array([0., 0.])": lambda _: imvar.CLIPImageProcessor(
        image_mean=np.zeros(2)
    ),
}
SETTINGS = {
    "slice_size: expected an integer from 1 to 4, got 'foo'": lambda p: p.enable_attention_slicing("foo"),
    "slice_size: expected an integer from 1 to 4, got 0": lambda p: p.enable_attention_slicing(0),
    "slice_size: expected an integer from 1 to 4, got True": lambda p: p.enable_attention_slicing(True),
    "slice_size: expected an integer from 1 to 4, got 1000": lambda p: p.enable_attention_slicing(1000),
    "s1: expected a finite number, got nan": lambda p: p.enable_freeu(NAN, 0.2, 1.2, 1.4),
    "b1: expected a finite number, got inf": lambda p: p.enable_freeu(0.9, 0.2, INF, 1.4),
    "attention_op: expected an SDPBackend out of ... or a callable, got 'flash'": lambda p: (
        p.enable_xformers_memory_efficient_attention("flash")
    ),
    "device: expected 'cpu', 'cuda' or another device that this PyTorch supports, got 'foo'": lambda p: p.to("foo"),
    "device: expected 'cpu', 'cuda' or another device that this PyTorch supports, got 'cuda:99'": lambda p: p.to(
        device="cuda:99"
    ),
    (
        "dtype: expected one of torch.float16, torch.bfloat16, torch.float32, torch.float64, its "
        "name, or 'auto', got torch.int32"
    ): lambda p: p.to(torch.int32),
    (
        "dtype: expected one of torch.float16, torch.bfloat16, torch.float32, torch.float64, its "
        "name, or 'auto', got torch.int8"
    ): lambda p: p.to("cpu", torch_dtype=torch.int8),
    (
        "dtype: expected one of torch.float16, torch.bfloat16, torch.float32, torch.float64, its "
        "name, or 'auto', got torch.complex64"
    ): lambda p: p.to(torch.zeros(1, dtype=torch.complex64)),
    (
        "dtype: expected one of torch.float16, torch.bfloat16, torch.float32, torch.float64, its "
        "name, or 'auto', got torch.float8_e4m3fn"
    ): lambda p: p.to(torch.float8_e4m3fn),
    "dtype: expected a dtype, got 'auto'": lambda p: p.to(dtype="auto"),
    "device: expected 'cpu', 'cuda' or another device that this PyTorch supports, got 2.5": lambda p: p.to(2.5),
    "device: expected one value, got meta and cpu": lambda p: p.to("cpu", device="meta"),
    "dtype: expected one value, got torch.float32 and torch.float64": lambda p: p.to(
        torch.float64, dtype=torch.float32
    ),
    "non_blocking: expected a bool, got 'x'": lambda p: p.to("cpu", non_blocking="x"),
    "to: expected arguments among device, dtype, non_blocking, memory_format": lambda p: p.to(foo=1),
    "device: expected an accelerator, got 'meta'": lambda p: p.enable_model_cpu_offload(device="meta"),
    "set_progress_bar_config: expected options of tqdm such as disable=True, got {'foo': 1}": lambda p: (
        p.set_progress_bar_config(foo=1)
    ),
    "set_progress_bar_config: expected options of tqdm such as disable=True, got {'miniters': 'x'}": lambda p: (
        p.set_progress_bar_config(miniters="x")
    ),
    "set_progress_bar_config: expected options of tqdm such as disable=True, got {'file': 3}": lambda p: (
        p.set_progress_bar_config(file=3)
    ),
    "iterable: expected an iterable, got 5": lambda p: p.progress_bar(5),
    "slice_size: expected an integer from 1 to 4, got array([1, 1])": lambda p: p.enable_attention_slicing(
        np.array([1, 1])
    ),
    "attention_op: expected an SDPBackend out of ... or a callable, got [3]": lambda p: (
        p.enable_xformers_memory_efficient_attention([3])
    ),
    "s1: expected a finite number, got <an integer of 20001 bits>": lambda p: p.enable_freeu(2**20000, 1, 1, 1),
    "s2: expected a number above 0, got 0": lambda p: p.enable_freeu(1, 0, 1, 1),
    "attend: expected a function of q, k and v, got 3": lambda p: imvar.sliced(1, 3),
    "use_tiling: expected True or False, got 'no'": lambda p: p.vae.enable_tiling("no"),
    "device: expected 'cpu', 'cuda' or another device that this PyTorch supports, got 'bar'": lambda p: (
        p.enable_model_cpu_offload(device="bar")
    ),
    "gpu_id: expected an integer >= 0, got -1": lambda p: p.enable_model_cpu_offload(gpu_id=-1, device="cpu"),
    "compile: expected options of torch.compile, got {'mode': 'foo'}: Unrecognized mode=foo": lambda p: p.compile(
        mode="foo"
    ),
    "compile: expected options of torch.compile, got {'mode': []}: unhashable type: 'list'": lambda p: p.compile(
        mode=[]
    ),
    "compile: expected options of torch.compile, got {'foo': 3}: ... unexpected keyword argument 'foo'": lambda p: (
        p.compile(foo=3)
    ),
    "size: expected an integer >= 1, got 0": lambda p: imvar.sliced(0),
    "size: expected an integer >= 1, got 'x'": lambda p: imvar.sliced("x"),
    "model: expected a model with imvar's attention layers, got Linear": lambda _: imvar.set_attend(
        torch.nn.Linear(1, 1), imvar.sdpa
    ),
    "config: expected at least one config field of UNet2DConditionModel": lambda _: (
        imvar.UNet2DConditionModel.from_config(DDIMScheduler().config)
    ),
    "attend: expected a function of q, k and v, got None": lambda p: imvar.set_attend(p.unet, None),
    "kind: expected a class of attention layers, got 'x'": lambda p: imvar.set_attend(p.unet, imvar.sdpa, "x"),
    "model: expected a model with layers of class PixelAttention at '*', got UNet2DConditionModel": lambda p: (
        imvar.set_attend(p.unet, imvar.sdpa, kind=imvar.models.PixelAttention)
    ),
    "where: expected a pattern that matches a name of named_modules(), such as 'up_blocks.1.*', got 'up.*'": (
        lambda p: imvar.replace_layers(p.unet, torch.nn.Linear, lambda layer: layer, where="up.*")
    ),
    "where: expected a string, got 3": lambda p: imvar.replace_layers(p.unet, torch.nn.Linear, lambda layer: layer, 3),
    "model: expected a module, got str": lambda p: imvar.set_attend("unet", imvar.sdpa),
    "old: expected a class of layers, got 'x'": lambda p: imvar.replace_layers(p.unet, "x", lambda layer: layer),
    "make: expected a function that returns a module, got None for a Linear": lambda p: imvar.replace_layers(
        p.unet.time_embedding, torch.nn.Linear, lambda layer: None
    ),
    "vae: expected an AutoencoderKL, got UNet2DConditionModel, which has no decode": lambda p: type(p)(
        **(p.components | {"vae": p.unet})
    ),
    "unet: expected a UNet2DConditionModel, got AutoencoderKL, which is for vae": lambda p: type(p)(
        **(p.components | {"unet": p.vae})
    ),
    "vae: expected an AutoencoderKL, got int": lambda p: type(p)(1, 2, 3, 4, 5, 6),
    "use_safetensors: expected True or False, got 'x'": lambda p: imvar.UNet2DConditionModel.from_pretrained(
        "imvar-emoji", "unet", use_safetensors="x"
    ),
    "compile: expected True or False, got 'yes'": lambda p: type(p).from_pretrained("imvar-emoji", compile="yes"),
    (
        "dtype: expected one of torch.float16, torch.bfloat16, torch.float32, torch.float64, its "
        "name, or 'auto', got 'foo'"
    ): lambda p: type(p).from_pretrained("imvar-emoji", dtype="foo"),
}


def without(pipe, name):
    parts = pipe.components | {name: None}
    return type(pipe)(**parts, requires_safety_checker=False)(Image.open(PHOTO), num_inference_steps=1)


PARTS = {
    f"{name}: expected {word}": lambda p, name=name: without(p, name)
    for name, word in (
        ("vae", "an AutoencoderKL"),
        ("image_encoder", "a CLIPVision"),
        ("scheduler", "a scheduler"),
        ("unet", "a UNet2DConditionModel"),
    )
}


def walk(kind):
    scheduler = kind(**(PUBLISHED_SCHEDULER if kind is PNDMScheduler else {}))
    scheduler.set_timesteps(4)
    return scheduler


def step(kind, output=x, sample=x, t=None, **options):
    scheduler = walk(kind)
    return scheduler.step(output, scheduler.timesteps[0] if t is None else t, sample, **options)


KINDS = (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)
narrow = x[..., :8]
SCHEDULERS = {
    f"{kind.__name__}: {words}": lambda _, kind=kind, call=call: call(kind)
    for kind in KINDS
    for words, call in {
        "model_output: expected a tensor of shape (2, 4, 16, 16), the shape of sample": lambda kind: step(
            kind, sample=two
        ),
        "model_output: expected a tensor of shape (1, 4, 16, 16), the shape of sample": lambda kind: step(
            kind, output=narrow
        ),
        "model_output: expected a tensor of shape (1, 4, 16, 16), the shape of sample, got NoneType": lambda kind: step(
            kind, output=None
        ),
        "sample: expected a tensor (b, c, h, w), got NoneType": lambda kind: step(kind, sample=None),
        "sample: expected floating-point values of 16 bits or more, got values of torch.int64": lambda kind: step(
            kind, sample=x.long()
        ),
        "timestep: expected ... got 5000": lambda kind: step(kind, t=5000),
        "timestep: expected ... got nan": lambda kind: step(kind, t=NAN),
        "original_samples: expected a tensor (b, ...), got NoneType": lambda kind: walk(kind).add_noise(
            None, x, torch.tensor([750])
        ),
        "original_samples: expected a tensor (b, ...), got a tensor of shape ()": lambda kind: walk(kind).add_noise(
            torch.tensor(1.0), x, torch.tensor([750])
        ),
        "noise: expected a tensor of shape (1, 4, 16, 16), the shape of the samples": lambda kind: walk(kind).add_noise(
            x, narrow, torch.tensor([750])
        ),
        "noise: expected a tensor of shape (2, 4, 16, 16), the shape of the samples": lambda kind: walk(kind).add_noise(
            two, x, torch.tensor([750])
        ),
        "timesteps: expected a tensor of one timestep for all 1 samples, or of one each": lambda kind: walk(
            kind
        ).add_noise(x, x, torch.tensor([750, 1])),
        "model_output: expected a tensor on cpu, the device of sample, got a tensor on meta": lambda kind: step(
            kind, output=x.to("meta")
        ),
        "timestep: expected ... got tensor(..., device='meta'": lambda kind: step(
            kind, t=torch.tensor(750, device="meta")
        ),
        "noise: expected a tensor on cpu, the device of the samples, got a tensor on meta": lambda kind: walk(
            kind
        ).add_noise(x, x.to("meta"), torch.tensor([750])),
        "timesteps: expected a tensor with values, got a tensor on the meta device; move it to the CPU": lambda kind: (
            walk(kind).add_noise(x, x, torch.tensor([750], device="meta"))
        ),
        "device: expected 'cpu', 'cuda' or another device that this PyTorch supports, got 'foo'": lambda kind: walk(
            kind
        ).set_timesteps(3, device="foo"),
        "num_inference_steps: expected an integer from 1 to 1000, got [3]": lambda kind: walk(kind).set_timesteps([3]),
    }.items()
} | {
    "variance_noise: expected a tensor of shape (1, 4, 16, 16), the shape of sample": lambda _: step(
        DDIMScheduler, eta=1.0, variance_noise=torch.zeros(1)
    ),
    "generator: expected a torch.Generator or a list of them, got 42; use torch.Generator()": lambda _: step(
        DDIMScheduler, eta=0.0, generator=42
    ),
    "generator: expected a torch.Generator or a list of them, got 42; use": lambda _: step(
        DDIMScheduler, eta=1.0, generator=42
    ),
    "timesteps: expected integers, got values of torch.float32": lambda _: walk(DDIMScheduler).add_noise(
        x, x, torch.tensor([3.5])
    ),
    "noise: expected a tensor of shape (1, 4, 16, 16), the shape of the samples": lambda _: walk(
        DDIMScheduler
    ).get_velocity(x, narrow, torch.tensor([3])),
}
PICTURES = {
    "image: expected a PIL image, an array ... got NoneType": lambda p: p.image_processor.preprocess(None),
    "image: expected a PIL image, an array ... got str": lambda p: p.image_processor.preprocess([str(PHOTO)]),
    "images[0]: expected a PIL image, an array or tensor of shape ... got str": lambda p: p.feature_extractor(
        [str(PHOTO)]
    ),
    "image[0]: expected a PIL image, a list of them or a tensor (b, 3, h, w) of normalized pixels, got str": lambda p: (
        p([str(PHOTO)])
    ),
    "image: expected a PIL image, a list of them or a tensor (b, 3, h, w) of normalized pixels, got str": lambda p: p(
        "https://example.org/cat.png"
    ),
    "image: expected finite values, got NaN": lambda p: p.image_processor.postprocess(
        torch.full((1, 3, 8, 8), NAN), "pt"
    ),
    "image: expected finite values, got NaN or": lambda p: p.image_processor.postprocess(
        torch.full((1, 3, 8, 8), NAN), "np"
    ),
    "image: expected finite values, got NaN or infinite values": lambda p: p.image_processor.postprocess(
        torch.full((1, 3, 8, 8), NAN)
    ),
    "images: expected an array (b, h, w, 3), got str": lambda p: p.numpy_to_pil("x"),
    "images: expected images of one size, got sizes [(8, 8), (64, 48)] (w, h)": lambda p: (
        p.image_processor.pil_to_numpy([PHOTO_OF_ONE_COLOUR, Image.new("RGB", (8, 8))])
    ),
    "images: expected an array (b, h, w, c), got an array of shape (2, 2)": lambda p: p.image_processor.numpy_to_pt(
        np.zeros((2, 2))
    ),
    "images: expected an array (b, h, w, c), got NoneType": lambda p: p.image_processor.numpy_to_pt(None),
    "images: expected a tensor (b, c, h, w), got a tensor of shape (2, 2)": lambda p: p.image_processor.pt_to_numpy(
        torch.zeros(2, 2)
    ),
    "images: expected a tensor (b, c, h, w), got list": lambda p: p.image_processor.pt_to_numpy([1]),
    "image: expected floats in [0, 1], got values of object": lambda p: p.image_processor.preprocess(
        np.zeros((8, 8, 3), object)
    ),
    "images: expected an array (b, h, w, 3) or (b, h, w, 1), got an array of shape (2, 2)": lambda p: p.numpy_to_pil(
        np.zeros((2, 2))
    ),
    "images: expected an array (b, h, w, 3) or (b, h, w, 1), got an array of shape (1, 2, 2, 4)": lambda p: (
        p.numpy_to_pil(np.zeros((1, 2, 2, 4)))
    ),
    "images: expected an array (b, h, w, 3) or (b, h, w, 1), got an array of shape (0, 2, 2, 3)": lambda p: (
        p.numpy_to_pil(np.zeros((0, 2, 2, 3)))
    ),
    "images: expected a PIL image or a list of them, got str": lambda p: p.image_processor.pil_to_numpy("x"),
    (
        "generator: expected a torch.Generator or a list of them, got 42; use "
        "torch.Generator().manual_seed(42), or seed=42"
    ): lambda p: randn((1, 4), 42),
    "image: expected a path, got None": lambda p: imvar.load_image(None),
    "image: expected a path, got 3": lambda p: imvar.load_image(3),
    "image: expected a file or its bytes, got 'https://example.org/cat.png'; URLs are not fetched": lambda p: (
        imvar.load_image("https://example.org/cat.png")
    ),
    "b'': expected a JPEG, PNG, ... file, got an empty one": lambda p: imvar.load_image(b""),
    "image: expected a file opened in mode 'rb', got a file opened as text": lambda p: imvar.load_image(
        io.StringIO("x")
    ),
    "image: expected a path that is not empty and has no NUL character, got '\\x00'": lambda p: imvar.load_image("\0"),
    "formats: expected a list of Pillow formats such as ['JPEG', 'PNG', 'WEBP'], got ['XX']": lambda p: (
        imvar.load_image(PHOTO, formats=["XX"])
    ),
    "formats: expected a list ... got None": lambda p: imvar.load_image(PHOTO, formats=None),
    "chelsea.jpg: expected a PNG file, got an unknown or another format": lambda p: imvar.load_image(
        PHOTO, formats=["PNG"]
    ),
    "image: expected a path, got [PosixPath(": lambda p: imvar.load_image([PHOTO]),
    "no such file": lambda p: imvar.load_image(PHOTO.with_name("nothing.jpg")),
}
CASES = MODELS | META | ARGUMENTS | SETTINGS | PARTS | SCHEDULERS | PICTURES


@pytest.mark.parametrize("words", CASES)
def test_refused_by_name(pipe, words):
    with pytest.raises(InputError) as caught:
        CASES[words](pipe)
    message = words.partition(": ")[2] if words.partition(": ")[0] in [kind.__name__ for kind in KINDS] else words
    for piece in message.split(" ... "):
        assert piece in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_pictures_from_bytes_and_files():
    expected = np.asarray(imvar.load_image(PHOTO))
    assert np.array_equal(np.asarray(imvar.load_image(str(PHOTO))), expected)
    assert np.array_equal(np.asarray(imvar.load_image(PHOTO.read_bytes())), expected)
    with open(PHOTO, "rb") as file:
        assert np.array_equal(np.asarray(imvar.load_image(file)), expected)
        assert not file.closed
    assert np.array_equal(np.asarray(imvar.load_image(io.BytesIO(PHOTO.read_bytes()))), expected)


def test_wrong_types_are_type_errors(pipe):
    with pytest.raises(InputTypeError, match=r"device: expected .*, got True"):
        pipe.to(device=True)
    for wrong in (None, "3", [1]):
        with pytest.raises(InputTypeError):
            pipe.unet(x, wrong, context)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (("cpu",), {"non_blocking": True}),
        (("cpu", torch.float32, True), {}),
        ((torch.zeros(1),), {}),
        ((None,), {}),
        ((), {}),
        ((), {"torch_dtype": "float32"}),
        ((torch.float32,), {"silence_dtype_warnings": True}),
        ((), {"memory_format": torch.channels_last}),
        ((torch.device("cpu"),), {"dtype": torch.float32}),
    ],
)
def test_all_ways_to_move(pipe, args, options):
    assert pipe.to(*args, **options) is pipe
    assert (pipe.dtype, pipe.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize("factor", [np.float32(0.5), np.int64(2), torch.tensor(0.5), np.array(1.5)])
def test_factors_of_any_kind(pipe, factor):
    taken = []
    for one in (factor, float(factor)):
        pipe.enable_freeu(one, one, one, one)
        taken.append(pipe.unet(x, 1, context + 1).sample)
        pipe.disable_freeu()
    assert torch.equal(*taken)
