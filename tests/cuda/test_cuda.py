"""On CUDA, beside diffusers: every dtype with every way to attend, FreeU and offloading."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend

import imvar
from imvar import schedulers
from imvar.models.attention import SDPAKernel, sdpa

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NOISY = ["DDPMScheduler", "EulerAncestralDiscreteScheduler"]


def plain(pipe):
    pass


def sliced(pipe):
    pipe.enable_attention_slicing("max")


def memory_efficient(pipe):
    if isinstance(pipe, imvar.StableDiffusionImageVariationPipeline):
        pipe.enable_xformers_memory_efficient_attention()  # the reference would need xformers for it


def freeu(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def tiled(pipe):
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()


def call(pipe, photo, seed=5, device="cpu", **options):
    generator = torch.Generator(device).manual_seed(seed)
    return pipe(photo, generator=generator, **({"num_inference_steps": 3, "output_type": "np"} | options))


def settled(pipe, dtype, setting):
    setting(pipe)
    return pipe.to("cuda", dtype)


@pytest.mark.parametrize("setting", [plain, sliced, memory_efficient, freeu, tiled], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pictures(ours, ref, photo, dtype, setting):
    given = {"latents": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)}
    exact = call(settled(ref, torch.float32, setting), photo, latents=given["latents"].float()).images
    mine = call(settled(ours, dtype, setting), photo, **given)
    theirs = call(settled(ref, dtype, setting), photo, **given)
    assert mine.nsfw_content_detected == theirs.nsfw_content_detected
    if dtype == torch.float32:
        assert np.abs(mine.images - theirs.images).max() <= 1e-4
    else:
        noise = np.abs(theirs.images - exact)  # the reference's own distance between half and full precision
        assert np.abs(mine.images - exact).mean() <= 1.2 * noise.mean()
        assert np.abs(mine.images - theirs.images).max() <= 2 * noise.max()  # each as far from the exact one


@pytest.mark.parametrize("name", schedulers.__all__)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_noise_and_schedulers(ours, ref, photo, name, device):
    """Noise from a generator of either device; nothing of a scheduler needs to live on the GPU."""
    import diffusers

    ours.scheduler = getattr(imvar, name).from_config(ours.scheduler.config)
    ref.scheduler = getattr(diffusers, name).from_config(ref.scheduler.config)
    options = {"device": device, "eta": 0.5, "guidance_scale": 3, "num_images_per_prompt": 2}
    mine, theirs = (call(pipe.to("cuda"), photo, **options).images for pipe in (ours, ref))
    assert np.abs(mine - theirs).max() <= 1e-4


def test_a_seed_gives_the_same_picture_on_cpu_and_gpu(ours, photo):
    on_cpu = call(ours, photo, guidance_scale=1).images
    assert np.abs(call(ours.to("cuda"), photo, guidance_scale=1).images - on_cpu).max() <= 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offload(ours, photo, dtype):
    """The same pictures; between and after calls every part is in main memory, and little is held on the GPU."""
    ours.to(dtype)
    expected = call(ours.to("cuda"), photo).images
    ours.to("cpu")
    ours.enable_model_cpu_offload()
    before = torch.cuda.memory_allocated()
    assert np.array_equal(call(ours, photo).images, expected)
    assert {model.device.type for model in ours.modules.values()} == {"cpu"}
    assert torch.cuda.memory_allocated() <= before + 1024
    with pytest.raises(ZeroDivisionError):
        call(ours, photo, callback=lambda *_: 1 / 0)
    assert {model.device.type for model in ours.modules.values()} == {"cpu"}
    ours.to("cuda")
    assert np.array_equal(call(ours, photo).images, expected)


@pytest.mark.parametrize(
    "backend",
    [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION],
    ids=str,
)
@pytest.mark.parametrize("shape", [(2, 8, 4096, 40), (2, 8, 1024, 80), (2, 8, 256, 160)], ids=str)
def test_backends_give_the_answer_and_its_gradients(backend, shape):
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    answers = []
    for kernel in (SDPAKernel(backend), sdpa):
        answer = kernel(q, k, v)
        answers.append((answer, *torch.autograd.grad(answer, (q, k, v), weight)))
    for mine, usual in zip(*answers, strict=True):
        assert (mine - usual).float().abs().max() <= 2e-2 * usual.float().abs().max()
    assert flags == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())


def test_training_steps_lower_the_loss(ours):
    unet = ours.unet.to("cuda").train()
    unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3)
    torch.manual_seed(0)
    x, context, target = torch.randn(4, 4, 16, 16), torch.randn(4, 1, 24), torch.randn(4, 4, 16, 16)
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", torch.bfloat16):
            loss = (unet(x.cuda(), 7, context.cuda()).sample - target.cuda()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("timesteps_on", "samples_on"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
@pytest.mark.parametrize("name", schedulers.__all__)
def test_a_loop_with_timesteps_on_another_device(name, timesteps_on, samples_on):
    """As a hand-written loop may have them: `set_timesteps` with one device, samples and timesteps on another."""

    def loop(timesteps_on, samples_on):
        scheduler = getattr(imvar, name)()
        x, output = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(samples_on)
        scheduler.set_timesteps(5, device=timesteps_on)
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t.to(samples_on))
            options = {"generator": torch.Generator().manual_seed(1)} if name in NOISY else {}
            x = scheduler.step(output, t.to(samples_on), x, **options).prev_sample
        return x.cpu()

    expected = loop("cpu", "cpu")
    assert (loop(timesteps_on, samples_on) - expected).abs().max() <= 1e-5 * expected.abs().max()
