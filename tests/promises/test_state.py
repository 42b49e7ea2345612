"""A valid call equals that of a new pipeline, after and during any other calls."""

from __future__ import annotations

import copy
import io
import multiprocessing
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import imvar
from imvar import DDIMScheduler, LMSDiscreteScheduler, PNDMScheduler, StableDiffusionImageVariationPipeline
from imvar.kernels.int8_kernels import has_int8_kernels
from tests.support.random_checkpoint import tiny_pipeline


def images_of(pipe, photo, **options):
    return pipe(photo, **({"num_inference_steps": 3, "output_type": "np", "seed": 0} | options)).images


def fresh(scheduler=None):
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    if scheduler:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **CHANGES.get(scheduler, {}))
    return pipe


CHANGES = {DDIMScheduler: {"clip_sample": False}}


class Stop:
    """Raise KeyboardInterrupt at the n-th line that imvar runs, as Ctrl-C may at any point of a call."""

    def __init__(self, at: int):
        self.left = at

    def __call__(self, frame, event, _):
        return self.line if "imvar" in frame.f_code.co_filename else None

    def line(self, frame, event, _):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.line

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)


@pytest.mark.parametrize("way", ["plain", "offload", "slicing", "half of the steps guided"])
def test_stopped_at_any_point(photo, way):
    pipe, options = fresh(), {"guidance_interval": (0, 0.5)} if way.startswith("half") else {}
    if way == "offload":
        pipe.enable_model_cpu_offload(device="cpu:0")
    if way == "slicing":
        pipe.enable_attention_slicing(1)
        pipe.enable_vae_slicing()
    expected = images_of(pipe, photo, **options)
    with Stop(10**9) as counting:
        images_of(pipe, photo, **options)
    lines = 10**9 - counting.left
    assert lines > 1000
    stopped = 0
    for at in range(1, lines, lines // 23):
        with Stop(at):
            try:
                images_of(pipe, photo, **options)
            except KeyboardInterrupt:
                stopped += 1
        assert torch.get_num_threads() == 1
        assert torch.is_grad_enabled()
    assert stopped >= 20
    assert np.array_equal(images_of(pipe, photo, **options), expected)


def test_changes_between_calls(photo):
    """Each setting is enabled and disabled again; then the images are those of before."""
    pipe = fresh()
    expected, scheduler = images_of(pipe, photo), pipe.scheduler

    for change, back in [
        (lambda: pipe.enable_attention_slicing("max"), pipe.disable_attention_slicing),
        (pipe.enable_vae_slicing, pipe.disable_vae_slicing),
        (pipe.enable_vae_tiling, pipe.disable_vae_tiling),
        (lambda: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4), pipe.disable_freeu),
        (pipe.enable_xformers_memory_efficient_attention, pipe.disable_xformers_memory_efficient_attention),
        (lambda: pipe.to(torch.float64), lambda: pipe.to(torch.float32)),
        (pipe.enable_fp8, pipe.disable_fp8),
        *([(pipe.enable_int8, pipe.disable_int8)] if has_int8_kernels() else []),
        (lambda: pipe.enable_model_cpu_offload(device="cpu:0"), pipe.remove_all_hooks),
        (
            lambda: setattr(pipe, "scheduler", LMSDiscreteScheduler.from_config(scheduler.config)),
            lambda: setattr(pipe, "scheduler", scheduler),
        ),
    ]:
        change()
        images_of(pipe, photo, height=72, num_images_per_prompt=2)
        back()
        assert np.array_equal(images_of(pipe, photo), expected)


@pytest.mark.parametrize("what", ["scheduler", "slicing", "freeu", "steps"])
def test_changes_during_a_call(photo, what):
    """From a callback: the next call equals that of a pipeline with the change from the start."""
    pipe = fresh()

    def change(target):
        if what == "scheduler":
            target.scheduler = DDIMScheduler.from_config(target.scheduler.config, clip_sample=False)
        elif what == "slicing":
            target.enable_attention_slicing(1)
        elif what == "freeu":
            target.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        else:
            target.scheduler.set_timesteps(7)

    images_of(pipe, photo, callback=lambda i, *_: change(pipe) if i == 1 else None, num_inference_steps=4)
    other = fresh()
    change(other)
    assert np.array_equal(images_of(pipe, photo), images_of(other, photo))


@pytest.mark.parametrize("shared", [True, False], ids=["one pipeline", "shared components"])
@pytest.mark.parametrize("threads", [2, 4])
def test_threads(photo, threads, shared):
    """Each with other seeds, steps, sizes, schedulers and guidance."""
    pipe, kinds = fresh(), (PNDMScheduler, DDIMScheduler, LMSDiscreteScheduler)
    pipes = [pipe] * threads
    if not shared:
        pipes = [StableDiffusionImageVariationPipeline(**pipe.components) for _ in range(threads)]
        for i, one in enumerate(pipes):
            one.scheduler = kinds[i % 3].from_config(pipe.scheduler.config)
            one.set_progress_bar_config(disable=True)
    options = [
        {
            "seed": i,
            "num_inference_steps": 2 + i,
            "height": 64 + 8 * i,
            "num_images_per_prompt": 1 + i % 2,
            "guidance_scale": 3.0 * (i % 3),
        }
        for i in range(threads)
    ]
    expected = [images_of(one, photo, **more) for one, more in zip(pipes, options, strict=True)]
    results: list = [None] * threads
    together = threading.Barrier(threads)

    def work(i):
        together.wait()
        results[i] = [images_of(pipes[i], photo, **options[i]) for _ in range(2)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for found, images in zip(results, expected, strict=True):
        assert all(np.array_equal(one, images) for one in found)


def in_a_child(pipe, photo, queue):
    queue.put(images_of(pipe, photo))


@pytest.mark.skipif(not hasattr(multiprocessing.get_context(), "Process") or sys.platform != "linux", reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
def test_fork_after_use(pipe, photo, threads):
    torch.set_num_threads(threads)
    expected, fork = images_of(pipe, photo), multiprocessing.get_context("fork")
    queue = fork.Queue()
    child = fork.Process(target=in_a_child, args=(pipe, photo, queue), daemon=True)
    child.start()
    try:
        assert np.abs(queue.get(timeout=60) - expected).max() < 1e-5
    finally:
        child.join(10)
        child.kill()
    assert np.array_equal(images_of(pipe, photo), expected)


def test_a_copy_during_a_call(pipe, photo):
    copies = []
    expected = images_of(pipe, photo, callback=lambda *_: copies.append(copy.deepcopy(pipe)))
    assert np.array_equal(images_of(copies[1], photo), expected)
    assert copies[1].scheduler.num_inference_steps is None


def test_a_shallow_copy_has_its_own_components_and_settings(pipe):
    twin, settings, components = copy.copy(pipe), dict(pipe.config), dict(pipe.components)
    twin.register_to_config(requires_safety_checker=False)
    twin.register_modules(extra=torch.nn.Linear(2, 2))
    assert (dict(pipe.config), pipe.components) == (settings, components)
    assert not twin.config.requires_safety_checker
    assert [*twin.components] == [*components, "extra"]


def test_arguments_are_not_written_to(pipe, photo):
    image, before = photo.copy(), np.asarray(photo).copy()
    noise = torch.randn(1, 4, 16, 16)
    tensor, noise_before = torch.rand(1, 3, 32, 32), noise.clone()
    tensor_before = tensor.clone()
    images_of(pipe, [image], latents=noise, seed=None)
    images_of(pipe, tensor, latents=noise, seed=None)
    assert np.array_equal(np.asarray(image), before)
    assert torch.equal(noise, noise_before)
    assert torch.equal(tensor, tensor_before)


def test_two_errors_in_a_row_change_nothing(pipe, photo):
    with pytest.raises(imvar.OutOfMemoryError):
        images_of(pipe, photo, num_images_per_prompt=2**16, height=2**15, width=2**15)
    with pytest.raises(ZeroDivisionError):
        images_of(pipe, photo, callback=lambda *_: 1 / 0)
    assert np.array_equal(images_of(pipe, photo), images_of(fresh(), photo))


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "JPEG", "WEBP"])
def test_threads_that_share_an_image_file(pipe, kind):
    """Pillow decodes an image correctly only in one thread at a time."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), dtype=np.uint8)).save(file, kind)
    expected = pipe.feature_extractor(Image.open(file), return_tensors="np").pixel_values
    for _ in range(3):
        shared = Image.open(io.BytesIO(file.getvalue()))
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(pipe.feature_extractor, shared, return_tensors="np") for _ in range(4)]
        assert all(np.array_equal(future.result().pixel_values, expected) for future in futures)
