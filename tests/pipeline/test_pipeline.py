"""The pipeline as a whole: what it refuses, the state that a call leaves, and which scheduler is visible where."""

import copy
import pickle
import sys
import threading

import numpy as np
import pytest
import torch
from huggingface_hub.utils import enable_progress_bars
from PIL import Image

import imvar
from imvar import DDIMScheduler, InputError, InputTypeError, StableDiffusionImageVariationPipeline
from tests.support.offloading import offload_to_meta
from tests.support.random_checkpoint import tiny_pipeline


def run(pipe, image, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return pipe(image, **({"num_inference_steps": 3, "output_type": "np", "generator": generator} | options)).images


NAN, INF = float("nan"), float("inf")
WRONG = {
    "image": [
        None,
        "cat.png",
        b"",
        3,
        [],
        [None],
        ["cat.png"],
        [3],
        torch.ones(3, 4),
        torch.ones(2, 4, 32, 32),
        torch.ones(1, 3, 32, 32, dtype=torch.uint8),
        torch.full((1, 3, 32, 32), NAN),
        torch.ones(0, 3, 32, 32),
        torch.ones(1, 3, 31, 31),
    ],
    "height": [0, -64, 2**30, 100, 64.0, "64", True],
    "width": [0, -64, 2**30, 100, 64.0, "64", True],
    "num_inference_steps": [0, -4, 1001, 2.5, "3", None, True],
    "guidance_scale": [NAN, INF, "3", None, True],
    "num_images_per_prompt": [0, -1, 1.5, "2", True],
    "eta": [NAN, "0.5", None],
    "generator": [42, "seed", [42], [], [torch.Generator()] * 2],
    "latents": [
        torch.ones(1, 4, 8, 8),
        torch.ones(2, 4, 16, 16),
        torch.full((1, 4, 16, 16), NAN),
        3,
        torch.ones(1, 4, 16, 16, dtype=torch.int64),
    ],
    "output_type": ["jpeg", None, 3, np.ones(2)],
    "callback": [3, "print"],
    "callback_steps": [0, -1, 1.5, None, "1", True],
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda value: str(value).split(" at 0x")[0][:40])
def test_an_invalid_argument_is_named_before_the_first_step(pipe, photo, name, value):
    options = {"image": photo, name: value}
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(InputError) as caught:
        run(pipe, **options)
    assert name in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_out_of_range_under_ddim(pipe, photo, eta):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(InputError, match="eta"):
        run(pipe, photo, eta=eta)


def test_a_good_call_after_a_bad_one_equals_a_fresh_one(pipe, photo):
    expected = run(tiny(), photo)

    def interrupt(i, t, latents):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, photo, callback=interrupt)
    with pytest.raises(InputError):
        run(pipe, photo, num_inference_steps=0)
    assert np.array_equal(run(pipe, photo), expected)
    assert pipe.scheduler.num_inference_steps is None


def tiny(**options):
    pipe = tiny_pipeline(**options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_call_within_a_callback(pipe, photo):
    expected, other = run(pipe, photo), run(pipe, photo, seed=1, num_inference_steps=2)
    inner = []
    outer = run(pipe, photo, callback=lambda *_: inner.append(run(pipe, photo, seed=1, num_inference_steps=2)))
    assert np.array_equal(outer, expected)
    assert len(inner) == 3
    assert all(np.array_equal(images, other) for images in inner)


def test_the_scheduler_that_is_visible(pipe, photo):
    """During a call, in hooks and callbacks too, that call's copy; elsewhere the one that was set."""
    schedulers = []

    class Recorder(StableDiffusionImageVariationPipeline):
        def check_inputs(self, *args):
            schedulers.append(self.scheduler)
            super().check_inputs(*args)

        def prepare_extra_step_kwargs(self, generator, eta):
            schedulers.append(self.scheduler)
            self.timestep_count = len(self.scheduler.timesteps)
            return super().prepare_extra_step_kwargs(generator, eta)

    recorder = Recorder(**pipe.components)
    recorder.set_progress_bar_config(disable=True)
    run(recorder, photo, callback=lambda *_: schedulers.append(recorder.scheduler))
    assert all(scheduler is schedulers[0] for scheduler in schedulers)
    assert schedulers[0] is not recorder.scheduler
    assert recorder.scheduler is pipe.scheduler
    assert recorder.timestep_count == 4  # attributes that a stage sets stay on the pipeline
    outside = []
    run(recorder, photo, callback=lambda *_: outside.append(in_a_thread(lambda: recorder.scheduler)))
    assert outside[0] is recorder.scheduler


def test_schedulers_with_lists_or_patched_methods(pipe, photo):
    """A list that a scheduler appends to is shared with its copy; a monkeypatched method is called."""
    expected, notes = run(pipe, photo), []

    class Noting(imvar.PNDMScheduler):
        def step(self, *args, **options):
            self.notes.append(self.counter)
            return super().step(*args, **options)

    scheduler = Noting.from_config(pipe.scheduler.config)
    scheduler.notes, scheduler.lock = notes, threading.Lock()
    pipe.scheduler = scheduler
    assert np.array_equal(run(pipe, photo), expected)
    assert notes == [0, 1, 2, 3]
    plain = scheduler.step
    scheduler.step = lambda eps, t, x, **options: plain(eps * 0.5, t, x, **options)
    assert not np.array_equal(run(pipe, photo), expected)


class Damped(StableDiffusionImageVariationPipeline):
    """Wraps the predictor, and lists the UNets for which one was built."""

    def predictor(self, timesteps, context, *args, **options):
        predict = super().predictor(timesteps, context, *args, **options)
        self.built_for.append(self.unet)
        return lambda x, step: 0.5 * predict(x, step)


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1}, {"guidance_interval": (0, 0.5)}, {"cache_interval": 2}])
def test_a_subclass_may_wrap_the_predictor(pipe, photo, options):
    """What it returns is run, with guidance over it, and built again when a callback changes the UNet."""
    wrapped = Damped(**pipe.components)
    wrapped.built_for, predictors = [], 2 if "guidance_interval" in options else 1
    wrapped.set_progress_bar_config(disable=True)
    damped = run(wrapped, photo, **options)
    assert wrapped.built_for == [pipe.unet] * predictors
    halved = tiny().unet
    halved.conv_out.weight.data *= 0.5
    halved.conv_out.bias.data *= 0.5
    changed = run(wrapped, photo, **options, callback=lambda i, *_: i == 3 and setattr(wrapped, "unet", halved))
    assert wrapped.built_for == [pipe.unet] * predictors * 2 + [halved] * predictors
    assert np.array_equal(changed, damped)  # after the last step
    pipe.unet = halved
    assert np.abs(run(pipe, photo, **options) - damped).max() < 1e-4


def test_a_custom_unet_that_is_replaced_in_a_callback(pipe, photo):
    """Also one that is not a module."""

    class Custom:
        def __init__(self, factor):
            self.config, self.factor = pipe.unet.config, factor

        def __call__(self, sample, timestep, encoder_hidden_states):
            return imvar.outputs.UNet2DConditionOutput(self.factor * sample)

    pipe.unet = Custom(0.1)
    expected = run(pipe, photo)
    assert np.array_equal(run(pipe, photo, callback=lambda *_: None), expected)
    changed = run(pipe, photo, callback=lambda i, *_: i == 1 and setattr(pipe, "unet", Custom(0.2)))
    assert not np.array_equal(changed, expected)


def in_a_thread(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def test_threads_with_their_own_schedulers_and_sizes(pipe, photo):
    pipes = [pipe, StableDiffusionImageVariationPipeline(**pipe.components)]
    pipes[1].scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipes[1].set_progress_bar_config(disable=True)
    jobs = [(pipes[i % 2], {"seed": i, "num_inference_steps": 2 + i, "height": 64 + 8 * i}) for i in range(4)]
    expected = [run(p, photo, **options) for p, options in jobs]
    results = [None] * len(jobs)

    def work(i):
        p, options = jobs[i]
        results[i] = run(p, photo, **options)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(np.array_equal(a, b) for a, b in zip(results, expected, strict=True))


def test_components_are_shared_with_their_settings(pipe, photo):
    other = StableDiffusionImageVariationPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    assert other.components == pipe.components
    assert list(pipe.components) == ["vae", "image_encoder", "unet", "scheduler", "safety_checker", "feature_extractor"]
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert np.array_equal(run(other, photo), run(pipe, photo))


def test_copies_and_pickles(pipe, photo):
    expected = run(pipe, photo)
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe)), copy.copy(pipe)):
        assert np.array_equal(run(twin, photo), expected)
    twin = copy.deepcopy(pipe)
    twin.unet.conv_in.weight.data.zero_()
    assert np.array_equal(run(pipe, photo), expected)


SETTINGS = {
    "offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu:0"),
    "memory-efficient": lambda pipe: pipe.enable_xformers_memory_efficient_attention(),
    "sliced": lambda pipe: imvar.set_attend(pipe.unet, imvar.sliced(1)),
    "bar": lambda pipe: pipe.set_progress_bar_config(disable=True, file=sys.stderr),
    "everything": lambda pipe: (pipe.enable_freeu(0.9, 0.2, 1.2, 1.4), pipe.enable_vae_tiling(), pipe.compile()),
}


@pytest.mark.filterwarnings("ignore:memory-efficient attention")
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_are_copied_and_pickled(pipe, photo, setting):
    SETTINGS[setting](pipe)
    twins = pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe)
    pipe._compiler = None  # compiling takes a minute
    assert all((twin._compiler is not None) == (setting == "everything") for twin in twins)
    expected = run(pipe, photo)
    for twin in twins:
        twin._compiler = None
        assert np.array_equal(run(twin, photo), expected)
        twin.to("cpu")
        assert not twin.unet._forward_pre_hooks
    assert bool(pipe.unet._forward_pre_hooks) == (setting == "offload")


def test_offload_moves_each_component_before_it_runs(pipe, photo, monkeypatch):
    """On a machine without an accelerator the moves are from the CPU to the CPU, in the same order."""
    expected, moves = run(pipe, photo), []
    names = {id(module): name for name, module in pipe.modules.items()}
    plain = torch.nn.Module.to

    def to(module, device):
        moves.append((names[id(module)], str(device)))
        return plain(module, device)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    pipe.enable_model_cpu_offload(device="cpu:0")
    moves.clear()
    assert np.array_equal(run(pipe, photo), expected)
    arrivals = [name for name, device in moves if device == "cpu:0"]
    assert arrivals == ["image_encoder", "unet", "vae", "safety_checker"]
    assert moves[-1] == ("safety_checker", "cpu")
    assert len(moves) == 8
    with pytest.raises(ZeroDivisionError):
        run(pipe, photo, callback=lambda *_: 1 / 0)
    assert moves[-1] == ("unet", "cpu")
    assert pipe._execution_device == torch.device("cpu:0")
    pipe.remove_all_hooks()
    moves.clear()
    assert np.array_equal(run(pipe, photo), expected)
    assert moves == []


def test_offloaded_components_run_only_after_they_moved(pipe, photo, monkeypatch):
    """Until then they are on the meta device."""
    image = torch.rand(1, 3, 64, 64)
    expected, coded = run(pipe, photo), pipe.vae.encode(image).latent_dist.mode()
    offload_to_meta(pipe, monkeypatch)
    for _ in range(2):
        assert np.array_equal(run(pipe, photo), expected)
        assert {next(module.parameters()).device.type for module in pipe.modules.values()} == {"meta"}
    assert torch.equal(pipe.vae.encode(image).latent_dist.mode(), coded)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this is about machines without an accelerator")
def test_offload_needs_an_accelerator(pipe):
    with pytest.raises(InputError, match="accelerator"):
        pipe.enable_model_cpu_offload()
    with pytest.raises(InputError, match="gpu_id"):
        pipe.enable_model_cpu_offload(gpu_id=1, device="cuda:0")


def test_to(pipe, photo):
    assert pipe.to(torch.bfloat16) is pipe
    assert {module.dtype for module in pipe.modules.values()} == {torch.bfloat16}
    assert run(pipe, photo).dtype == np.float32
    assert pipe.to("cpu", torch_dtype=torch.float32).dtype == torch.float32
    assert pipe.to("cpu", torch.float64).dtype == torch.float64
    assert pipe.device == torch.device("cpu")


def test_nothing_is_trained_by_a_call(pipe, photo):
    latents = pipe(photo, num_inference_steps=2, output_type="latent").images
    assert not latents.requires_grad
    assert torch.is_grad_enabled()


def test_latents_as_input_and_output(pipe, photo):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    kept = noise.clone()
    assert np.array_equal(run(pipe, photo, latents=noise), run(pipe, photo))
    assert np.array_equal(run(pipe, photo, latents=noise.double()), run(pipe, photo))
    assert torch.equal(noise, kept)
    output = pipe(photo, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0))
    assert output.nsfw_content_detected is None
    assert list(output) == ["images"]
    assert output.images.shape == (1, 4, 16, 16)


def test_every_image_of_a_batch_has_its_own_noise(pipe, photo):
    images = pipe([photo, photo], num_inference_steps=2, num_images_per_prompt=2, output_type="np").images
    assert len(images) == 4
    assert all(np.abs(a - b).max() > 0.01 for i, a in enumerate(images) for b in images[:i])


def test_images_that_are_not_finite_are_an_error(pipe, photo):
    pipe.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(imvar.ImvarError, match="expected finite values, got NaN"):
        run(pipe, photo)


def test_construction(pipe):
    components = pipe.components
    with pytest.warns(UserWarning, match="requires_safety_checker=False"):
        StableDiffusionImageVariationPipeline(**(components | {"safety_checker": None}))
    StableDiffusionImageVariationPipeline(**(components | {"safety_checker": None}), requires_safety_checker=False)
    with pytest.raises(InputError, match="feature_extractor"):
        StableDiffusionImageVariationPipeline(**(components | {"feature_extractor": None}))
    assert pipe.config["requires_safety_checker"] is pipe.config.requires_safety_checker is True
    assert "AutoencoderKL" in repr(pipe)


def test_sizes_without_sample_size(pipe, photo):
    pipe.unet.register_to_config(sample_size=None)
    with pytest.raises(InputError, match="no sample_size"):
        run(pipe, photo, height=64)
    assert run(pipe, photo, height=64, width=72).shape == (1, 64, 72, 3)
    pipe.unet.register_to_config(sample_size=(8, 16))
    assert run(pipe, photo).shape == (1, 64, 128, 3)


def test_progress_bars(photo, capsys):
    enable_progress_bars()  # the tests in reference/ disable all bars of huggingface_hub
    pipe = tiny_pipeline()
    run(pipe, photo)
    assert "3/3" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    run(pipe, photo)
    assert capsys.readouterr().err == ""
    assert list(pipe.progress_bar(range(3))) == [0, 1, 2]
    with pytest.raises(ValueError, match="progress_bar"):
        pipe.progress_bar()


def test_pil_images(pipe, photo):
    output = pipe([photo, photo], num_inference_steps=1, width=64)
    assert [image.size for image in output.images] == [(64, 128)] * 2
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in output["images"])
    assert output.images is output[0]
    assert output.to_tuple() == (output.images, output.nsfw_content_detected)
    assert pipe.numpy_to_pil(np.zeros((2, 8, 8, 3)))[1].size == (8, 8)


def test_check_inputs(pipe, photo):
    with pytest.raises(InputTypeError):
        pipe.check_inputs("photo.jpg", 64, 64, 1)
    with pytest.raises(InputError, match="height: expected a multiple of 8 from 8 to 65536, got 65"):
        pipe.check_inputs(photo, 65, 64, 1)
    pipe.check_inputs(photo, 64, 64, 1)


def test_half_precision_that_overflows_in_the_autoencoder(pipe, photo):
    """Latents are decoded again in float32, with a warning; the images equal those of a float32 autoencoder."""
    expected = run(pipe, photo)
    middle = pipe.vae.decoder.up_blocks[1].resnets[0]
    scale = 1e5  # beyond float16, between two layers that cancel it
    middle.conv1.weight.data *= scale
    middle.conv1.bias.data *= scale
    assert np.abs(run(pipe, photo) - expected).max() < 1e-2  # a norm follows
    wide = run(pipe, photo)
    pipe.to(torch.float16)
    with pytest.warns(UserWarning, match="float16 overflowed") as warned:
        narrow = pipe(photo, num_inference_steps=3, output_type="np", seed=0).images
    assert warned[0].filename == __file__
    assert np.abs(narrow - wide).max() < 0.05
    assert pipe.vae.dtype == torch.float16


def test_latents_that_are_not_finite_name_the_cause(pipe, photo):
    with pytest.raises(imvar.ImvarError, match=r"latents.*: expected finite.*guidance_scale or latents too large"):
        run(pipe, photo, guidance_scale=1e38)
    pipe.unet.mid_block.resnets[0].conv1.bias.data[3] = NAN
    with pytest.raises(imvar.ImvarError, match=r"UNet2DConditionModel has some in .*resnets\.0\.conv1\.bias"):
        run(pipe, photo)


def test_components_of_several_dtypes(pipe, photo):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = run(pipe, photo, latents=noise)
    pipe.unet.double()
    assert np.abs(run(pipe, photo, latents=noise) - expected).max() < 1e-4
    pipe.vae.to(torch.bfloat16)
    pipe.safety_checker.double()
    assert np.abs(run(pipe, photo, latents=noise) - expected).max() < 0.1


def test_components_on_two_devices_are_named(pipe, photo):
    pipe.vae.to("meta")
    with pytest.raises(InputError, match=r"different devices \(vae on meta, image_encoder on cpu"):
        run(pipe, photo)


@pytest.mark.parametrize("size", [2**15])
def test_out_of_memory_names_options_that_need_less(pipe, photo, size):
    with pytest.raises(imvar.OutOfMemoryError, match=r"num_images_per_prompt.*height and width") as caught:
        run(pipe, photo, num_images_per_prompt=2**16, height=size, width=size)
    assert isinstance(caught.value, (torch.OutOfMemoryError, RuntimeError))
    assert caught.value.__cause__ is not None


def test_a_device_that_is_too_small_is_named(pipe, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "to", full)
        with pytest.raises(imvar.OutOfMemoryError, match=r"float16, or enable_model_cpu_offload\(\)"):
            pipe.to("cpu")


@pytest.mark.parametrize("error", [RuntimeError("raised"), imvar.OutOfMemoryError("raised")])
def test_errors_of_a_callback_are_passed_on(pipe, photo, error):
    def fail(*_):
        raise error

    with pytest.raises(RuntimeError) as caught:
        run(pipe, photo, callback=fail)
    assert caught.value is error


def test_an_image_with_exif_rotation(pipe, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.jpg", exif=exif)
    warned = pytest.warns(UserWarning, match="EXIF.*imvar.load_image")
    with Image.open(tmp_path / "turned.jpg") as turned, warned:
        pipe([photo, turned], num_inference_steps=1)
    assert warned[0].filename == __file__


def test_a_tensor_of_pixels_that_are_not_normalized(pipe):
    with pytest.warns(UserWarning, match="values up to 255") as warned:
        pipe(torch.full((1, 3, 32, 32), 255.0), num_inference_steps=1)
    assert warned[0].filename == __file__
