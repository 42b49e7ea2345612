"""Usages of public programs, each in its smallest form, with imvar beside diffusers on one tiny checkpoint."""

import copy
import json
import pickle
import warnings

import diffusers
import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from diffusers.configuration_utils import FrozenDict
from diffusers.training_utils import EMAModel
from PIL import Image

import imvar
from imvar import InputError, schedulers
from tests.reference.conftest import ours, ref, ref_folder

__all__ = ["ours", "ref", "ref_folder"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__"),  # diffusers' schedulers
    pytest.mark.filterwarnings("ignore:Accessing config attribute"),
    pytest.mark.filterwarnings("ignore:The `resume_download` argument"),
]


def call(pipe, photo, **options):
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"} | options
    return pipe(photo, generator=torch.Generator().manual_seed(5), **options).images


def assert_equal(ours, theirs):
    """Assert that images in [0, 1] are equal to 1e-5, and tensors of another range to as much of it."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert np.ptp(theirs) > 0.01
    assert np.abs(ours - theirs).max() <= 1e-5 * max(np.ptp(theirs), 1)


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def assert_one_level(ours, theirs):
    """Assert that two PIL images differ by one level at most."""
    ours, theirs = (np.asarray(image).astype(int) for image in (ours, theirs))
    assert np.ptp(theirs) > 20
    assert np.abs(ours - theirs).max() <= 1


def tform(size=32):
    """The preprocessing of the model card."""
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def transform(image):
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        x = torch.nn.functional.interpolate(x, (size, size), mode="bicubic", align_corners=False)[0]
        return (x - mean) / std

    return transform


# Calls


def test_the_script_of_the_model_card(ref_folder, photo, tmp_path):
    for library in imvar, diffusers:
        pipe = library.StableDiffusionImageVariationPipeline.from_pretrained(ref_folder, revision="v2.0")
        pipe = pipe.to("cpu")
        inp = tform()(photo).to("cpu").unsqueeze(0)
        out = pipe(inp, guidance_scale=3, num_inference_steps=4, generator=seeded())
        out["images"][0].save(tmp_path / f"{library.__name__}.png")
    assert_one_level(*(Image.open(tmp_path / f"{name}.png") for name in ("imvar", "diffusers")))


def test_a_tensor_without_a_batch_axis(ours, ref, photo):
    """diffusers fails here."""
    inp = tform()(photo)
    assert_equal(call(ours, inp), call(ref, inp[None]))


@pytest.mark.parametrize(
    "options",
    [
        {"torch_dtype": torch.float32},
        {"safety_checker": None},
        {"safety_checker": None, "requires_safety_checker": False},
        {"variant": None, "revision": None, "cache_dir": None},
        {"local_files_only": True, "low_cpu_mem_usage": True, "use_safetensors": True},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.filterwarnings("ignore:safety_checker=None")
def test_options_of_from_pretrained(ref_folder, photo, options):
    images = []
    for library in imvar, diffusers:
        pipe = library.StableDiffusionImageVariationPipeline.from_pretrained(ref_folder, **options)
        pipe.set_progress_bar_config(disable=True)
        images.append(call(pipe, photo))
        assert (pipe.safety_checker is None) is ("safety_checker" in options)
    assert_equal(*images)


@pytest.mark.parametrize("checker", [None, lambda images, clip_input: (images, [False] * len(images))])
def test_a_replaced_safety_checker(ours, ref, photo, checker):
    flags = []
    for pipe in ours, ref:
        pipe.safety_checker = checker
        pipe.requires_safety_checker = False
        flags.append(pipe(photo, num_inference_steps=2, generator=seeded()).nsfw_content_detected)
    assert flags[0] == flags[1] == (checker and [False])
    assert_equal(call(ours, photo), call(ref, photo))


SCHEDULERS = [
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "DEISMultistepScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_diffusers(ours, ref, photo, name):
    kind = getattr(diffusers, name)
    for pipe in ours, ref:
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **({"clip_sample": False} if name[0] == "D" else {}))
        pipe.unet.conv_out.weight.data *= 0.1  # random networks magnify rounding
        pipe.unet.conv_out.bias.data *= 0.1
    assert_equal(call(ours, photo), call(ref, photo))


def test_the_demo(ours, ref, photo):
    """A list of one image n times, the flags of the result, and numbers of sliders."""
    results = []
    for pipe in ours, ref:
        out = pipe(
            2 * [photo],
            guidance_scale=np.float64(3),
            num_inference_steps=np.int64(4),
            generator=seeded(),
            height=np.int32(128),
        )
        shown = [
            image.resize((8, 8)) if nsfw else image
            for image, nsfw in zip(out["images"], out["nsfw_content_detected"], strict=True)
        ]
        results.append(shown)
    for ours_image, theirs in zip(*results, strict=True):
        assert_one_level(ours_image, theirs)


def test_a_batch_for_augmentation(ours, ref, photo):
    inputs = torch.stack([tform()(photo), tform()(photo.rotate(90))])
    images = []
    for pipe in ours, ref:
        images.append(pipe(inputs, 128, 128, 3, num_images_per_prompt=2, generator=seeded(), output_type="np").images)
        assert len(images[-1]) == 4
    assert_equal(*images)


@pytest.mark.parametrize("mode", ["RGBA", "L"])
def test_modes_of_images(ours, ref, photo, mode):
    image = photo.convert(mode)
    if mode == "RGBA":
        image.putalpha(128)
    assert_equal(call(ours, image), call(ref, image))


def test_autocast(ours, ref, photo):
    images = []
    for pipe in ours, ref:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            images.append(call(pipe, photo, num_inference_steps=2))
    assert np.ptp(images[1]) > 0.1
    assert np.abs(images[0] - images[1]).max() < 0.1  # of bfloat16's rounding


def test_previews_in_a_callback(ours, ref, photo):
    previews = []
    for pipe in ours, ref:
        shown = []

        def show(step, timestep, latents, pipe=pipe, shown=shown):
            decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
            shown.append((step, int(timestep), pipe.numpy_to_pil(pipe.decode_latents(latents)), decoded))

        call(pipe, photo, callback=show, callback_steps=2)
        previews.append(shown)
    assert [shown[:2] for shown in previews[0]] == [shown[:2] for shown in previews[1]]
    for (*_, images, decoded), (*_, their_images, their_decoded) in zip(*previews, strict=True):
        assert_one_level(images[0], their_images[0])
        assert_equal(decoded, their_decoded)


@pytest.mark.filterwarnings("ignore:memory-efficient attention")
def test_switches_that_save_memory(ours, ref, photo):
    for pipe in ours, ref:
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        pipe.vae.enable_tiling()
        pipe.vae.enable_slicing()
        pipe.enable_attention_slicing()
        try:
            pipe.enable_xformers_memory_efficient_attention()
        except Exception:  # as clients do, since diffusers fails without xformers
            pipe.enable_attention_slicing()
        pipe.unet.to(memory_format=torch.channels_last)
    assert_equal(call(ours, photo, height=192), call(ref, photo, height=192))


# Components


def test_pipelines_share_components(ours, ref, photo):
    images = []
    for pipe in ours, ref:
        other = type(pipe)(**pipe.components)
        other.set_progress_bar_config(disable=True)
        assert other.unet is pipe.unet
        images.append(call(other, photo))
    assert_equal(*images)


def test_a_saved_pipeline_is_one_of_diffusers(ours, ref, photo, tmp_path):
    ours.unet.conv_in.bias.data += 0.5
    ours.save_pretrained(tmp_path)
    before = call(ours, photo)
    for kind in diffusers.StableDiffusionImageVariationPipeline, diffusers.DiffusionPipeline:
        pipe = kind.from_pretrained(tmp_path)
        pipe.set_progress_bar_config(disable=True)
        assert_equal(before, call(pipe, photo))


def test_components_of_imvar_in_a_pipeline_of_diffusers(ours, ref, photo):
    mixed = diffusers.StableDiffusionImageVariationPipeline(**ours.components)
    mixed.set_progress_bar_config(disable=True)
    assert_equal(call(mixed, photo), call(ref, photo))


def interpolated(pipe, photo):
    """Variations between two images, by the methods of a pipeline and a loop of one's own."""
    with torch.no_grad():
        first, second = (pipe._encode_image(image, "cpu", 1, True) for image in (photo, photo.rotate(180)))
        context = torch.lerp(first, second, 0.3)
        pipe.scheduler.set_timesteps(4)
        latents = pipe.prepare_latents(1, pipe.unet.config.in_channels, 128, 128, context.dtype, "cpu", seeded())
        extra = pipe.prepare_extra_step_kwargs(seeded(), 0.0)
        for t in pipe.progress_bar(pipe.scheduler.timesteps):
            both = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), t)
            uncond, cond = pipe.unet(both, t, encoder_hidden_states=context).sample.chunk(2)
            latents = pipe.scheduler.step(uncond + 3 * (cond - uncond), t, latents, **extra).prev_sample
        image = pipe.decode_latents(latents)
        image, flags = pipe.run_safety_checker(image, "cpu", torch.float32)
        assert flags == [False]
        return pipe.numpy_to_pil(image)[0]


def test_interpolated_embeddings(ours, ref, photo):
    assert_one_level(interpolated(ours, photo), interpolated(ref, photo))
    for pipe in ours, ref:
        embedding = pipe._encode_image(photo.rotate(90), "cpu", 1, True)
        pipe._encode_image = lambda *_, embedding=embedding: embedding
    assert_equal(call(ours, photo), call(ref, photo))


def test_hooks_and_a_replaced_forward(ours, ref, photo):
    for pipe in ours, ref:
        pipe.unet.conv_in.register_forward_hook(lambda module, args, output: output * 0.9)
        pipe.unet.mid_block.register_forward_hook(lambda module, args, output: output * 1.1)
        forward = pipe.unet.forward
        pipe.unet.forward = lambda sample, *args, forward=forward, **more: forward(sample * 1.05, *args, **more)
    assert_equal(call(ours, photo), call(ref, photo))


def test_an_image_encoder_for_others(ours, ref, ref_folder, photo):
    """As in animation by a reference image, and in the reconstruction of images from brain activity."""
    embeddings = []
    for library, processor in (imvar, ours.feature_extractor), (transformers, ref.feature_extractor):
        encoder = library.CLIPVisionModelWithProjection.from_pretrained(f"{ref_folder}/image_encoder")
        encoder = encoder.to(dtype=torch.float32, device="cpu")
        assert encoder.training is False
        encoder.eval().requires_grad_(False)
        pixels = processor.preprocess(photo, return_tensors="pt").pixel_values.to("cpu", dtype=encoder.dtype)
        embeddings.append(encoder(pixels).image_embeds.unsqueeze(1))
        hidden = encoder.vision_model(pixels)[0]
        hidden = encoder.visual_projection(encoder.vision_model.post_layernorm(hidden))
        assert encoder.visual_projection.in_features == 32
        embeddings.append(hidden)
        embeddings.append(encoder.vision_model.embeddings(pixels))
    for i in range(3):
        assert_equal(embeddings[i], embeddings[i + 3])


def test_parts_of_the_autoencoder(ours, ref, photo):
    x = torch.from_numpy(np.array(photo.resize((64, 64)))).permute(2, 0, 1)[None] / 127.5 - 1
    results = []
    with torch.no_grad():
        for pipe in ours, ref:
            vae = pipe.vae
            posterior = vae.encode(x).latent_dist
            latents = posterior.mode() * vae.config.scaling_factor
            moments = vae.quant_conv(vae.encoder(x))
            decoded = vae.decoder(vae.post_quant_conv(latents / vae.config.scaling_factor))
            frames = [vae.decode(frame[None] / vae.config.scaling_factor).sample for frame in latents]
            drawn = posterior.sample(generator=seeded())
            results.append((latents, posterior.mean, drawn, moments, decoded, torch.cat(frames)))
    for mine, theirs in zip(*results, strict=True):
        assert_equal(mine, theirs)


def test_schedulers_of_animation():
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "linear",
        "clip_sample": False,
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }
    x, noise, output = torch.randn(3, 2, 4, 8, 8, generator=seeded())
    results = []
    for library in imvar, diffusers:
        scheduler = library.DDIMScheduler(**settings)
        t = torch.randint(0, scheduler.num_train_timesteps, (2,), generator=seeded()).long()
        noisy = scheduler.add_noise(x, noise, t)
        velocity = scheduler.get_velocity(x, noise, t)
        scheduler.set_timesteps(5, device="cpu")
        stepped = noisy
        for timestep in scheduler.timesteps:
            stepped = scheduler.step(output, timestep, stepped, eta=0.0, return_dict=False)[0]
        results.append((noisy, velocity, stepped))
    for mine, theirs in zip(*results, strict=True):
        assert_equal(mine, theirs)


# Training


@pytest.mark.parametrize("way", ["layer", "weight"])
def test_eight_input_channels(ours, ref, tmp_path, way):
    outputs = []
    for pipe, library in (ours, imvar), (ref, diffusers):
        unet, old = pipe.unet, pipe.unet.conv_in
        if way == "layer":
            unet.conv_in = torch.nn.Conv2d(8, old.out_channels, 3, padding=1)
            with torch.no_grad():
                unet.conv_in.weight.zero_()
                unet.conv_in.weight[:, :4].copy_(old.weight)
                unet.conv_in.bias.copy_(old.bias)
            unet.register_to_config(in_channels=8)
        else:
            old.weight = torch.nn.Parameter(old.weight.repeat(1, 2, 1, 1) / 2)
            old.in_channels = 8
            unet.config["in_channels"] = 8
        unet.save_pretrained(tmp_path / library.__name__)
        unet = library.UNet2DConditionModel.from_pretrained(tmp_path / library.__name__)
        assert unet.config.in_channels == 8
        x = torch.randn(1, 8, 16, 16, generator=seeded())
        output = unet(x, 5, torch.randn(1, 1, 24, generator=seeded())).sample
        output.square().mean().backward()
        outputs.append((output.detach(), unet.conv_in.weight.grad))
    for mine, theirs in zip(*outputs, strict=True):
        assert_equal(mine, theirs)


def test_gradients_reach_the_image(ours, ref, photo):
    grads = []
    pixels = torch.from_numpy(np.array(photo.resize((64, 64)))).permute(2, 0, 1)[None] / 127.5 - 1
    for pipe in ours, ref:
        image = pixels.clone().requires_grad_()
        latents = pipe.vae.encode(image).latent_dist.mode() * pipe.vae.config.scaling_factor
        eps = pipe.unet(latents, torch.tensor([500]), torch.ones(1, 1, 24)).sample
        eps.square().mean().backward()
        grads.append(image.grad / image.grad.abs().max())
    assert_equal(*grads)


def test_a_training_loop(ours, ref, ref_folder, photo, tmp_path):
    """As the scripts of text-to-image training; the trained UNet is saved in a pipeline."""
    losses = []
    for pipe, library in (ours, imvar), (ref, diffusers):
        noise_scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
        unet = library.UNet2DConditionModel.from_pretrained(ref_folder, subfolder="unet")
        pipe.vae.requires_grad_(False)
        unet.train()
        unet.enable_gradient_checkpointing()
        ema = EMAModel(unet.parameters(), model_cls=type(unet), model_config=unet.config)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
        generator = seeded()
        losses.append([])
        for _ in range(3):
            latents, noise = torch.randn(2, 2, 4, 16, 16, generator=generator)
            timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (2,), generator=generator).long()
            noisy = noise_scheduler.add_noise(latents, noise, timesteps)
            target = noise
            if noise_scheduler.config.prediction_type == "v_prediction":
                target = noise_scheduler.get_velocity(latents, noise, timesteps)
            pred = unet(noisy, timesteps, torch.randn(2, 1, 24, generator=generator)).sample
            loss = torch.nn.functional.mse_loss(pred.float(), target.float(), reduction="mean")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(unet.parameters())
            losses[-1].append(loss.item())
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
        averaged = unet.conv_in.weight.detach().clone()
        ema.restore(unet.parameters())
        assert not torch.equal(averaged, unet.conv_in.weight)
        trained = type(pipe).from_pretrained(ref_folder, unet=unet.eval())
        trained.save_pretrained(tmp_path / library.__name__)
    assert np.allclose(*losses, atol=1e-5)
    images = []
    for library in imvar, diffusers:
        pipe = library.StableDiffusionImageVariationPipeline.from_pretrained(tmp_path / library.__name__)
        pipe.set_progress_bar_config(disable=True)
        images.append(call(pipe, photo))
    assert np.abs(images[0] - images[1]).max() < 1e-3  # steps of Adam magnify the rounding of gradients near zero


# Names of parameters and modules


@pytest.mark.parametrize("part", ["unet", "vae", "image_encoder", "safety_checker"])
def test_state_dicts_are_exchanged(ours, ref, tmp_path, part):
    mine, theirs = getattr(ours, part), getattr(ref, part)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert [name for name, _ in mine.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    torch.save({f"module.{name}": value + 1 for name, value in mine.state_dict().items()}, tmp_path / "trained.pt")
    loaded = torch.load(tmp_path / "trained.pt", weights_only=True)
    stripped = {name.replace("module.", ""): value for name, value in loaded.items()}
    for model in mine, theirs:
        model.load_state_dict(stripped)
        first = next(iter(stripped))
        missing, unexpected = model.load_state_dict({first: stripped[first] * 0, "other": torch.ones(1)}, strict=False)
        assert (len(missing), unexpected) == (len(stripped) - 1, ["other"])
        assert torch.equal(model.state_dict()[first], stripped[first] * 0)


def test_older_names_of_the_attention_of_the_autoencoder(ours):
    """diffusers reads these in files alone."""
    new = ours.vae.state_dict()
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    older = {}
    for name, value in new.items():
        for now, then in names.items():
            name = name.replace(f".{now}.", f".{then}.")
        older[name] = value + 1
    assert older.keys() != new.keys()
    expected = {name: value + 1 for name, value in new.items()}
    ours.vae.load_state_dict(older)
    assert all(torch.equal(value, expected[name]) for name, value in ours.vae.state_dict().items())


@pytest.mark.parametrize(
    "select",
    [
        lambda name: "attn2" in name,
        lambda name: "attn1" in name and name.endswith("to_out.0.weight"),
        lambda name: "transformer_blocks" in name,
        lambda name: name.startswith("down_blocks") or name.startswith("mid_block"),
        lambda name: name.split(".")[-2] in ("to_k", "to_q", "to_v"),
    ],
)
def test_filters_find_the_same_parameters(ours, ref, select):
    found = [[name for name, _ in pipe.unet.named_parameters() if select(name)] for pipe in (ours, ref)]
    assert found[0] == found[1] != []
    modules = [[name for name, _ in pipe.unet.named_modules() if name.endswith("attn1")] for pipe in (ours, ref)]
    assert modules[0] == modules[1] != []


def test_features_of_blocks(ours, ref):
    taps = []
    for pipe in ours, ref:
        features = []

        def tap(module, args, output, features=features):
            features.append(output[0] if isinstance(output, tuple) else output)

        for block in (*pipe.unet.down_blocks, pipe.unet.mid_block, pipe.unet.up_blocks[1]):
            block.register_forward_hook(tap)
        pipe.vae.decoder.up_blocks[2].register_forward_hook(tap)
        with torch.no_grad():
            x = pipe.unet(torch.randn(1, 4, 16, 16, generator=seeded()), 5, torch.ones(1, 1, 24)).sample
            pipe.vae.decode(x)
            features.append(pipe.unet.time_proj(torch.tensor([5, 7])))
        taps.append(features)
    for mine, theirs in zip(*taps, strict=True):
        assert_equal(mine, theirs)


def test_a_controlnet_of_the_unet(ours, ref):
    outputs = []
    for pipe in ours, ref:
        controlnet = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_channels=3)
        for zero in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
            torch.nn.init.constant_(zero.weight, 0.01)
        for i, parameter in enumerate(controlnet.controlnet_cond_embedding.parameters()):
            torch.nn.init.normal_(parameter, std=0.1, generator=seeded(i))
        x, condition = torch.randn(1, 4, 16, 16, generator=seeded()), torch.rand(1, 3, 128, 128, generator=seeded())
        with torch.no_grad():
            downs, mid = controlnet(x, 5, torch.ones(1, 1, 24), condition, return_dict=False)
        outputs.append([*downs, mid])
    for mine, theirs in zip(*outputs, strict=True):
        assert_equal(mine, theirs)


# What imvar does not have is refused by name


@pytest.mark.parametrize(
    ("usage", "words"),
    [
        (
            lambda folder: imvar.UNet2DConditionModel.from_pretrained(
                folder, subfolder="unet", in_channels=8, ignore_mismatched_sizes=True
            ),
            "ignore_mismatched_sizes",
        ),
        (lambda folder: imvar.UNet2DConditionModel(class_embed_type="projection"), "class_embed_type"),
        (lambda folder: encoder(folder)(torch.zeros(1, 3, 32, 32), output_attentions=True), "output_attentions"),
        (
            lambda folder: encoder(folder)(torch.zeros(1, 3, 32, 32), interpolate_pos_encoding=True),
            "interpolate_pos_encoding",
        ),
    ],
)
def test_refusals_name_what_is_missing(ref_folder, usage, words):
    with pytest.raises((ValueError, TypeError), match=words):
        usage(ref_folder)


def encoder(folder):
    return imvar.CLIPVisionModelWithProjection.from_pretrained(folder, subfolder="image_encoder")


# Configs: code of the pipelines that were forked from Stable Diffusion replaces `_internal_dict`


def outdated_settings(scheduler=None, unet=None):
    """The checks that a pipeline's constructor of 2022 begins with."""
    if scheduler is not None:
        if getattr(scheduler.config, "steps_offset", 1) != 1:
            new_config = dict(scheduler.config)
            new_config["steps_offset"] = 1
            scheduler._internal_dict = FrozenDict(new_config)
        if getattr(scheduler.config, "clip_sample", False) is True:
            new_config = dict(scheduler.config)
            new_config["clip_sample"] = False
            scheduler._internal_dict = FrozenDict(new_config)
    if unet is not None and unet.config.sample_size < 64:
        new_config = dict(unet.config)
        new_config["sample_size"] = 64
        unet._internal_dict = FrozenDict(new_config)


@pytest.mark.parametrize("saved", [{}, {"clip_sample": True, "steps_offset": 0}], ids=["defaults", "in the file"])
def test_an_assigned_internal_dict_counts(ours, ref, photo, saved):
    images = []
    for pipe, library in (ours, imvar), (ref, diffusers):
        pipe.scheduler = library.DDIMScheduler(beta_schedule="scaled_linear", **saved)
        before = call(pipe, photo)
        outdated_settings(pipe.scheduler)
        images.append(call(pipe, photo))
        assert np.abs(images[-1] - before).max() > 0.01
        assert pipe.scheduler.config.clip_sample is pipe.scheduler._internal_dict["clip_sample"] is False
        pipe.scheduler.set_timesteps(4)
        assert pipe.scheduler.timesteps.tolist() == [751, 501, 251, 1]
    assert_equal(*images)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_constructor_of_a_pipeline_of_diffusers_changes_outdated_settings(ours):
    ours.unet.register_to_config(_diffusers_version="0.8.0")
    scheduler = imvar.DDIMScheduler()
    others = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    components = {"vae": ours.vae, "unet": ours.unet, "scheduler": scheduler}
    diffusers.StableDiffusionPipeline(**components, **others, requires_safety_checker=False)
    assert (scheduler.config.steps_offset, scheduler.config.clip_sample, ours.unet.config.sample_size) == (1, False, 64)


def test_an_assigned_size_counts(ours, ref):
    for pipe in ours, ref:
        outdated_settings(unet=pipe.unet)
        assert (pipe.unet.config.sample_size, pipe.unet.config["in_channels"]) == (64, 4)
    assert ours.default_size(None, None) == (512, 512)


@pytest.mark.parametrize("change", ["item", "attribute", "register"])
def test_a_setting_that_is_assigned_to_a_config_counts(ours, ref, photo, change):
    images = []
    for pipe, library in (ours, imvar), (ref, diffusers):
        pipe.scheduler = library.DDIMScheduler(beta_schedule="scaled_linear")
        config = pipe.scheduler.config
        if change == "item":
            config["prediction_type"], config["clip_sample"] = "v_prediction", False
            assert config["prediction_type"] == "v_prediction"
        elif change == "attribute":
            config.prediction_type, config.clip_sample = "v_prediction", False
            assert config.prediction_type == "v_prediction"
        else:
            pipe.scheduler.register_to_config(prediction_type="v_prediction", clip_sample=False)
        if change == "item":  # diffusers steps by the attributes, which items do not change
            pipe.scheduler._internal_dict = FrozenDict(dict(config))
        images.append(call(pipe, photo))
    assert_equal(*images)


def test_configs_that_were_shared_change_alone(ours):
    unet = ours.unet
    twin = imvar.UNet2DConditionModel(unet.config)
    shallow, deep = copy.copy(unet), copy.deepcopy(unet)
    pickled = pickle.loads(pickle.dumps(unet))
    for i, model in enumerate((unet, twin, shallow, deep, pickled)):
        model.config["sample_size"] = 20 + i
    assert [m.config.sample_size for m in (unet, twin, shallow, deep, pickled)] == [20, 21, 22, 23, 24]
    assert type(pickle.loads(pickle.dumps(unet.config))) is type(unet.config)
    assert unet.config == copy.copy(unet.config) == unet._internal_dict
    with pytest.raises(TypeError, match="register_to_config"):
        copy.copy(unet.config)["sample_size"] = 30  # of no model
    assert unet.config.sample_size == 20


def test_a_setting_that_is_assigned_to_the_config_of_a_pipeline_counts(ours, tmp_path):
    ours.config["requires_safety_checker"] = False
    ours.save_pretrained(tmp_path)
    ours.config.author = "me"
    assert (ours.config.requires_safety_checker, ours._internal_dict["author"]) == (False, "me")
    assert imvar.StableDiffusionImageVariationPipeline.from_pretrained(tmp_path).config.requires_safety_checker is False


def test_a_call_has_its_own_config(ours, photo):
    ours.scheduler = imvar.DDIMScheduler.from_config(ours.scheduler.config, clip_sample=False)

    def clip(step, timestep, latents):
        ours.scheduler.config["clip_sample"] = True

    assert not np.array_equal(call(ours, photo, callback=clip), call(ours, photo))
    assert ours.scheduler.config.clip_sample is False


def test_what_a_config_refuses_leaves_it_unchanged(ours):
    for component, name, value in (
        (ours.unet, "act_fn", "relu"),
        (ours.scheduler, "beta_start", 2.0),
        (imvar.LMSDiscreteScheduler(), "trained_betas", [0.0] * 1000),
    ):
        before, old = dict(component.config), dict(vars(component))
        for assign in (
            lambda c=component, n=name, v=value: c.config.__setitem__(n, v),
            lambda c=component, n=name, v=value: setattr(c.config, n, v),
            lambda c=component, n=name, v=value: setattr(c, "_internal_dict", {n: v}),
        ):
            with pytest.raises(InputError):
                assign()
        assert component.config == before
        assert all(vars(component)[key] is old[key] for key in old if key != "config")
    for change in (lambda c: c.update(sample_size=3), lambda c: c.setdefault("x", 3), lambda c: c.pop("sample_size")):
        with pytest.raises(TypeError, match="register_to_config"):
            change(ours.unet.config)
    with pytest.raises(TypeError, match="config: expected a config or a dictionary, got str"):
        ours.unet._internal_dict = "x"


@pytest.mark.parametrize("name", schedulers.__all__)
@pytest.mark.parametrize(
    "changes",
    [
        {"beta_start": 0.001, "beta_end": 0.03},
        {"num_train_timesteps": 500},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"set_alpha_to_one": False, "steps_offset": 1},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_tables_follow_an_assigned_config(name, changes):
    kind = getattr(imvar, name)
    changed, made = kind(skip_prk_steps=True) if name == "PNDMScheduler" else kind(), None
    x, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    changed.set_timesteps(10)
    changed._internal_dict = FrozenDict(dict(changed.config) | changes)
    made = kind.from_config(dict(changed.config))
    outputs = []
    for scheduler in changed, made:
        scheduler.set_timesteps(10)
        scheduler.scale_model_input(x, scheduler.timesteps[0])
        torch.manual_seed(0)
        outputs.append((scheduler.timesteps, scheduler.betas, scheduler.step(eps, scheduler.timesteps[0], x)[0]))
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
    if name == "DDIMScheduler" or "beta" in next(iter(changes)):
        assert not torch.equal(outputs[0][2], plain_step(kind, x, eps))


def plain_step(kind, x, eps):
    scheduler = kind(skip_prk_steps=True) if kind is imvar.PNDMScheduler else kind()
    scheduler.set_timesteps(10)
    scheduler.scale_model_input(x, scheduler.timesteps[0])
    torch.manual_seed(0)
    return scheduler.step(eps, scheduler.timesteps[0], x)[0]


def test_own_tables_stay_where_a_config_changes_nothing_of_them():
    scheduler = imvar.DDIMScheduler()
    scheduler.alphas_cumprod = mine = scheduler.alphas_cumprod**2
    scheduler.register_to_config(clip_sample=False, steps_offset=1)
    assert scheduler.alphas_cumprod is mine


# Loading: keywords that callers still pass

ACCEPTED = {
    "use_auth_token": False,
    "resume_download": True,
    "force_download": True,  # without effect on a folder
    "trust_remote_code": True,
    "mirror": "tuna",
    "offload_state_dict": True,
    "custom_pipeline": None,
    "device_map": None,
    "proxies": None,
    "low_cpu_mem_usage": False,
}


@pytest.mark.parametrize("option", ACCEPTED)
def test_keywords_of_from_pretrained(ref_folder, option):
    given = {option: ACCEPTED[option]}
    for library in imvar, diffusers:
        pipe = library.StableDiffusionImageVariationPipeline.from_pretrained(ref_folder, **given)
        assert pipe.unet.config.sample_size == 16
        unet = library.UNet2DConditionModel.from_pretrained(ref_folder, subfolder="unet", **given)
        assert unet.conv_in.weight.shape == pipe.unet.conv_in.weight.shape
        library.PNDMScheduler.from_pretrained(ref_folder, subfolder="scheduler", **given)
    if option not in ("use_auth_token", "resume_download", "custom_pipeline"):  # an error of transformers' models
        transformers.CLIPVisionModelWithProjection.from_pretrained(ref_folder, subfolder="image_encoder", **given)
    imvar.CLIPVisionModelWithProjection.from_pretrained(ref_folder, subfolder="image_encoder", **given)
    imvar.CLIPImageProcessor.from_pretrained(ref_folder, subfolder="feature_extractor", **given)


@pytest.mark.parametrize("part", ["unet", "vae", "image_encoder"])
def test_loading_info(ours, ref, ref_folder, part):
    infos = []
    for pipe in ours, ref:
        model, info = type(getattr(pipe, part)).from_pretrained(ref_folder, subfolder=part, output_loading_info=True)
        assert not model.training
        infos.append(info)
    assert infos[0] == infos[1]


# Configs as files


@pytest.mark.parametrize(
    ("name", "part"),
    [("UNet2DConditionModel", "unet"), ("AutoencoderKL", "vae"), ("PNDMScheduler", "scheduler")],
)
def test_configs_are_loaded_and_saved_alone(ref_folder, tmp_path, name, part):
    contents, made = [], []
    for library in imvar, diffusers:
        kind = getattr(library, name)
        contents.append(kind.load_config(ref_folder, subfolder=part))
        assert type(contents[-1]) is dict
        assert kind.load_config(str(ref_folder / part)) == contents[-1]
        assert kind.load_config(str(ref_folder / part / kind.config_name)) == contents[-1]
        same, unused = kind.load_config(ref_folder, subfolder=part, return_unused_kwargs=True, decay=0.5, revision=None)
        assert (same, unused) == (contents[-1], {"decay": 0.5})
        component, unused = kind.from_config(contents[-1] | {"decay": 0.5}, return_unused_kwargs=True, power=2)
        assert (unused["decay"], unused["power"], unused["_class_name"]) == (0.5, 2, name)
        component.save_config(tmp_path / library.__name__)
        text = (tmp_path / library.__name__ / kind.config_name).read_text()
        assert text == component.to_json_string()
        component.to_json_file(tmp_path / "copy.json")
        assert (tmp_path / "copy.json").read_text() == text
        assert [path.name for path in (tmp_path / library.__name__).iterdir()] == [kind.config_name]
        made.append(kind.from_config(str(tmp_path / library.__name__)))
        assert made[-1].config["_diffusers_version"] == "0.42.1"
    assert contents[0] == contents[1]
    assert saved_config(made[0]) == saved_config(made[1])
    with pytest.raises(imvar.CheckpointError, match=r"nowhere: expected a folder"):
        getattr(imvar, name).from_config(str(tmp_path / "nowhere"))
    with pytest.raises(TypeError, match=r"load_config: .* unknown argument 'decay'"):
        getattr(imvar, name).load_config(ref_folder, subfolder=part, decay=0.5)


def saved_config(component):
    return {key: value for key, value in json.loads(component.to_json_string()).items() if key != "decay"}


def test_unused_settings_of_from_pretrained(ref_folder):
    unused = []
    for library in imvar, diffusers:
        given = {"subfolder": "scheduler", "return_unused_kwargs": True, "steps_offset": 3, "power": 2}
        scheduler, rest = library.PNDMScheduler.from_pretrained(ref_folder, **given)
        assert scheduler.config.steps_offset == 3
        unused.append(rest)
    assert unused[0] == unused[1]


def test_an_index_is_loaded_and_saved_alone(ours, ref, ref_folder, tmp_path):
    for pipe in ours, ref:
        index = type(pipe).load_config(ref_folder)
        assert (type(index), index["unet"]) == (dict, ["diffusers", "UNet2DConditionModel"])
        pipe.save_config(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [pipe.config_name] == ["model_index.json"]


def test_a_moving_average_is_saved_and_resumed(ours, ref, tmp_path):
    """The hooks of training scripts with --use_ema."""
    resumed = []
    for pipe, kind in (ours, imvar.UNet2DConditionModel), (ref, diffusers.UNet2DConditionModel):
        ema = EMAModel(pipe.unet.parameters(), decay=0.9, model_cls=kind, model_config=pipe.unet.config)
        for step in range(3):
            pipe.unet.conv_in.bias.data += step + 1.0
            ema.step(pipe.unet.parameters())
        folder = tmp_path / kind.__module__.split(".")[0]
        ema.save_pretrained(folder)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no config fields .*decay")
            loaded = EMAModel.from_pretrained(folder, kind)
        assert (loaded.decay, loaded.optimization_step) == (0.9, 3)
        loaded.copy_to(pipe.unet.parameters())
        resumed.append(pipe.unet)
    for name, parameter in resumed[0].state_dict().items():
        assert torch.equal(parameter, resumed[1].state_dict()[name]), name


@pytest.mark.parametrize("part", ["unet", "image_encoder"])
def test_the_state_dict_of_accelerate_is_saved(ours, ref, tmp_path, part):
    """The recipe of accelerate's documentation, where sharded weights have to be gathered first."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(getattr(ours, part))
    tensors = {name: tensor * 0.5 for name, tensor in accelerator.get_state_dict(model).items()}
    options = {"is_main_process": accelerator.is_main_process, "save_function": accelerator.save}
    accelerator.unwrap_model(model).save_pretrained(tmp_path, state_dict=tensors, **options)
    loaded = type(getattr(ref, part)).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    name = tensors.popitem()[0]
    with pytest.raises(InputError, match=f"state_dict: .*{name}"):
        accelerator.unwrap_model(model).save_pretrained(tmp_path, state_dict=tensors)


# Attributes


def test_the_config_of_a_component_as_keywords(ours, ref):
    for name in "unet", "vae", "scheduler":
        kind, config = type(getattr(ours, name)), getattr(ours, name).config
        for settings in config, getattr(ref, name).config:
            new = kind(**settings).config
            assert all(new[key] == value for key, value in config.items() if key[:1] != "_")
        with pytest.raises(TypeError, match="no_such_field"):
            kind(**config, no_such_field=1)


def test_settings_are_attributes(ours, ref):
    """Of pipelines that were copied before 0.17, and of training scripts."""
    for pipe in ours, ref:
        assert (pipe.unet.in_channels, pipe.unet.sample_size, pipe.vae.latent_channels) == (4, 16, 4)
        assert (pipe.scheduler.num_train_timesteps, pipe.scheduler.prediction_type) == (1000, "epsilon")
        for component in pipe.unet, pipe.scheduler, pipe.image_encoder:
            assert not hasattr(component, "clip_skip")
            assert not hasattr(component, "__len_hint__")
        assert not hasattr(pipe.image_encoder, "hidden_size")
        for copied in copy.copy(pipe.unet), copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet)):
            assert copied.in_channels == 4
        pipe.scheduler.register_to_config(num_train_timesteps=900)
        assert copy.deepcopy(pipe.scheduler).num_train_timesteps == 900
    with pytest.raises(AttributeError, match="UNet2DConditionModel has no attribute or config field 'widths'"):
        _ = ours.unet.widths


def test_names_of_diffusers(ours, ref, ref_folder):
    for name in ("_optional_components", "model_cpu_offload_seq", "config_name", "has_compatibles", "name_or_path"):
        assert getattr(ours, name) == getattr(ref, name), name
    assert ours.config["_name_or_path"] == ref.config["_name_or_path"] == ref_folder
    assert type(ours)(**ours.components).name_or_path is type(ref)(**ref.components).name_or_path is None
    for part in ("unet", "vae", "scheduler"):
        for name in ("config_name", "has_compatibles"):
            assert getattr(getattr(ours, part), name) == getattr(getattr(ref, part), name), name
    kinds = ours.scheduler.compatibles
    assert {kind.__name__ for kind in kinds} == set(ours.scheduler._compatibles) <= set(ref.scheduler._compatibles)
    for kind in kinds:
        assert kind.from_config(ours.scheduler.config).config.beta_start == ours.scheduler.config.beta_start


# Methods


def test_fused_projections(ours, ref, photo):
    before = call(ours, photo)
    for pipe in ours, ref:
        pipe.fuse_qkv_projections()
        pipe.unet.fuse_qkv_projections()
        pipe.vae.fuse_qkv_projections()
    assert_equal(call(ours, photo), call(ref, photo))
    for pipe in ours, ref:
        pipe.unfuse_qkv_projections()
    assert np.array_equal(call(ours, photo), before)


def test_attention_processors_are_missing_with_a_hint(ours):
    for model in ours.unet, ours.vae:
        assert not hasattr(model, "attn_processors")
        assert not hasattr(model, "set_attn_processor")
        with pytest.raises(
            AttributeError, match=r"attn_processors: .* set_attend replaces kernels, and replace_layers"
        ):
            _ = model.attn_processors
        with pytest.raises(AttributeError, match=r"set_attn_processor: .*set_attend"):
            model.set_attn_processor({})


def test_the_default_attention(ours, ref, photo):
    before = call(ours, photo)
    ours.enable_xformers_memory_efficient_attention(lambda q, k, v: torch.zeros_like(q))
    assert not np.array_equal(call(ours, photo), before)
    for model in ours.unet, ours.vae, ref.unet, ref.vae:
        model.set_default_attn_processor()
    assert_equal(call(ours, photo), call(ref, photo))
    assert np.array_equal(call(ours, photo), before)


@pytest.mark.parametrize("size", [32, 64, 96, 200])
def test_tiled_encoding_and_decoding(ours, ref, size):
    """Asked for directly, tiles are made of images of any size."""
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        encoded = [pipe.vae.tiled_encode(images).latent_dist.mode() for pipe in (ours, ref)]
        decoded = [pipe.vae.tiled_decode(encoded[1], return_dict=False)[0] for pipe in (ours, ref)]
        assert_equal(*encoded)
        assert_equal(*decoded)
        assert_equal(ours.vae.tiled_encode(images, return_dict=False)[0].mean, encoded[1])
        assert torch.equal(ours.vae.tiled_decode(encoded[1]).sample, decoded[0])


def test_the_older_names_of_device_and_dtype(ours):
    assert ours.to(torch_device="cpu", torch_dtype=torch.float16).dtype is torch.float16
    with pytest.raises(InputError, match="device: expected one value, got"):
        ours.to("cpu", torch_device="meta")


def test_sequential_offload_is_model_offload(ours, photo):
    before = call(ours, photo)
    with pytest.warns(UserWarning, match="enable_sequential_cpu_offload: .* enable_model_cpu_offload"):
        ours.enable_sequential_cpu_offload(device="cpu")
    assert ours._offload is not None
    assert np.array_equal(call(ours, photo), before)


def own_forward(unet, x, t, context):
    """The blocks called one after the other, as in copies of diffusers' forward that return features."""
    temb, h = unet.time_embedding(unet.time_proj(t)), unet.conv_in(x)
    skips = (h,)
    for block in unet.down_blocks:
        attends = hasattr(block, "has_cross_attention") and block.has_cross_attention
        h, more = block(hidden_states=h, temb=temb, **({"encoder_hidden_states": context} if attends else {}))
        skips += more
    h = unet.mid_block(h, temb, encoder_hidden_states=context, attention_mask=None, cross_attention_kwargs=None)
    for block in unet.up_blocks:
        n = len(block.resnets)
        used, skips = skips[-n:], skips[:-n]
        options = {"upsample_size": skips[-1].shape[2:] if skips else None}
        if hasattr(block, "has_cross_attention") and block.has_cross_attention:
            options["encoder_hidden_states"] = context
        h = block(hidden_states=h, temb=temb, res_hidden_states_tuple=used, **options)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_forward_of_ones_own_over_the_blocks(ours, ref, tokens):
    x, context = torch.randn(2, 4, 8, 8, generator=seeded()), torch.randn(2, tokens, 24, generator=seeded(6))
    with torch.no_grad():
        outputs = [own_forward(pipe.unet, x, torch.tensor([3, 500]), context) for pipe in (ours, ref)]
        assert_equal(*outputs)
        assert_equal(outputs[0], ours.unet(x, torch.tensor([3, 500]), context).sample)


def own_attention(layer):
    """A forward that is written with the names of diffusers' layer, as in Plug-and-Play and MasaCtrl."""

    def forward(hidden_states, encoder_hidden_states=None, attention_mask=None, **options):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = layer.to_q(hidden_states), layer.to_k(context), layer.to_v(context)
        q, k, v = (layer.head_to_batch_dim(x) for x in (q, k, v))
        attended = (q @ k.mT * layer.scale).softmax(-1).square() @ v
        return layer.to_out[0](layer.batch_to_head_dim(attended))

    return forward


def own_resnet(layer):
    def forward(input_tensor, temb, *args, **options):
        assert layer.upsample is layer.downsample is None
        assert layer.time_embedding_norm == "default"
        h = layer.conv1(layer.nonlinearity(layer.norm1(input_tensor)))
        h = layer.norm2(h + layer.time_emb_proj(layer.nonlinearity(temb))[:, :, None, None])
        h = layer.conv2(layer.dropout(layer.nonlinearity(h)))
        x = input_tensor if layer.conv_shortcut is None else layer.conv_shortcut(input_tensor)
        return (x + 0.5 * h) / layer.output_scale_factor

    return forward


def test_forwards_of_layers_with_the_names_of_diffusers(ours, ref, photo):
    before = call(ours, photo)
    for pipe in ours, ref:
        for name, layer in pipe.unet.named_modules():
            if name.endswith("attn1"):
                layer.forward = own_attention(layer)
        resnet = pipe.unet.up_blocks[1].resnets[1]
        resnet.forward = own_resnet(resnet)
    assert_equal(call(ours, photo), call(ref, photo))
    assert not np.allclose(call(ours, photo), before, atol=0.01)


@pytest.mark.parametrize(
    ("path", "name", "value", "way"),
    [
        ("mid_block.resnets.0", "output_scale_factor", 1.4, "replace_layers"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1", "rescale_output_factor", 2.0, "project_out"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1", "norm_q", torch.nn.Identity(), "project_qkv"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2", "processor", lambda *qkv: 0, "set_attend"),
        ("up_blocks.0", "b1", 1.4, "enable_freeu"),
    ],
)
def test_an_attribute_that_counts_in_layers_of_diffusers_is_not_ignored(ours, path, name, value, way):
    with pytest.raises(InputError, match=f"{name}: .*{way}"):
        setattr(ours.unet.get_submodule(path), name, value)
    with pytest.raises(InputError, match=r"set_processor: .*set_attend"):
        ours.vae.decoder.mid_block.attentions[0].set_processor(None)


def test_a_subclass_of_a_layer_may_give_it_any_attribute(ours, photo):
    class NormedAttention(imvar.models.SelfAttention):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.norm_q = torch.nn.LayerNorm(self.dim // self.heads)

        def project_qkv(self, *args):
            q, k, v = super().project_qkv(*args)
            return self.norm_q(q), k, v

    before = call(ours, photo)
    imvar.replace_layers(ours.unet, imvar.models.SelfAttention, NormedAttention.from_layer)
    assert not np.allclose(call(ours, photo), before, atol=0.01)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (torch.nn.Linear, "forward"),
        (torch.nn.GroupNorm, "forward"),
        (torch.nn.Conv2d, "forward"),
        (torch.nn.Conv2d, "_conv_forward"),
    ],
)
def test_a_method_that_is_replaced_for_all_layers_of_torch_is_called(ours, ref, photo, monkeypatch, kind, method):
    """As web interfaces do for LoRA, or to normalise in float32."""
    original, before = getattr(kind, method), call(ours, photo, height=64, width=64)
    monkeypatch.setattr(kind, method, lambda self, x, *args: 1.2 * original(self, x + 0.1, *args))
    images = [call(pipe, photo, height=64, width=64) for pipe in (ours, ref)]
    assert_equal(*images)
    assert not np.allclose(images[0], before, atol=0.01)


def test_a_hook_on_all_modules_gets_every_convolution(ours, ref, photo):
    def hook(layer, args):
        return (args[0] + 0.5,) if isinstance(layer, torch.nn.Conv2d) else None

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        assert_equal(*(call(pipe, photo, height=64, width=64) for pipe in (ours, ref)))
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_linear_layers_are_quantized_or_refused(ours, ref, photo):
    """The quantization of PyTorch skips subclasses without a word."""

    def quantized(unet):
        return torch.ao.quantization.quantize_dynamic(unet, {torch.nn.Linear}, dtype=torch.qint8)

    before = call(ours, photo)
    with pytest.raises(InputError, match=r"quantization: .* layer.__class__ = torch.nn.Linear"):
        quantized(ours.unet)
    for layer in ours.unet.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.__class__ = torch.nn.Linear
    assert_equal(call(ours, photo), before)
    for pipe in ours, ref:
        pipe.unet = quantized(pipe.unet)
    images = [call(pipe, photo) for pipe in (ours, ref)]
    assert_equal(*images)
    assert not np.allclose(images[0], before, atol=1e-3)
    assert "a custom class" in ours.unet.why_plain()[0]
