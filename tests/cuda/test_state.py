"""On CUDA: stopped, shared, forked, copied, out of memory; the next good call equals that of a fresh pipeline."""

import copy
import multiprocessing
import pickle
import threading
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch

import imvar
from tests.promises.test_state import Stop
from tests.support.random_checkpoint import tiny_pipeline

WAYS = ["plain", "offload", "slicing"]


@pytest.fixture
def pipe():
    pipe = tiny_pipeline().to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made(pipe, photo, **options):
    return pipe(photo, **({"num_inference_steps": 3, "output_type": "np", "seed": 4} | options)).images


def settled(pipe, way):
    if way == "offload":
        pipe.enable_model_cpu_offload()
    if way == "slicing":
        pipe.enable_attention_slicing(1)
        pipe.enable_vae_slicing()
    return pipe


@pytest.mark.parametrize("way", WAYS)
def test_stopped_at_any_point(pipe, photo, way):
    expected = made(settled(pipe, way), photo)
    with Stop(10**9) as counting:
        made(pipe, photo)
    lines, stopped, held = 10**9 - counting.left, 0, torch.cuda.memory_allocated()
    for at in range(1, lines, lines // 13):
        with Stop(at):
            try:
                made(pipe, photo)
            except KeyboardInterrupt:
                stopped += 1
    assert stopped >= 10
    assert np.array_equal(made(pipe, photo), expected)
    if way == "offload":
        assert {model.device.type for model in pipe.modules.values()} == {"cpu"}
    assert torch.cuda.memory_allocated() <= held + 2**20


@pytest.mark.parametrize("way", WAYS)
def test_threads(pipe, photo, way):
    settled(pipe, way)
    options = [{"seed": i, "num_inference_steps": 2 + i, "height": 64 + 8 * i} for i in range(4)]
    expected, results = [made(pipe, photo, **more) for more in options], [None] * 4

    def work(i):
        results[i] = [made(pipe, photo, **options[i]) for _ in range(3)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for found, images in zip(results, expected, strict=True):
        assert max(np.abs(one - images).max() for one in found) < 1e-4


def in_a_child(pipe, photo, answer):
    try:
        answer.put(made(pipe, photo))
    except Exception as error:
        answer.put(str(error))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_is_told_how_to_start_instead(pipe, photo):
    expected, fork = made(pipe, photo), multiprocessing.get_context("fork")
    answer = fork.Queue()
    child = fork.Process(target=in_a_child, args=(pipe, photo, answer), daemon=True)
    child.start()
    try:
        assert "spawn" in answer.get(timeout=60)
    finally:
        child.join(10)
        child.kill()
    assert np.array_equal(made(pipe, photo), expected)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("way", [*WAYS, "compiled"])
def test_copies(pipe, photo, way, again):
    expected = made(settled(pipe, way), photo)
    if way == "compiled":
        pipe.compile(backend="eager")
        made(pipe, photo)
    other = again(pipe)
    for one in other, pipe:
        assert np.abs(made(one, photo) - expected).max() < 1e-4


@contextmanager
def at_most(size):
    """No more than so many bytes of the device for this process."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("way", WAYS)
def test_too_little_memory_in_any_part(pipe, photo, way):
    """It is said what would need less; everything is freed; and with enough the pictures are what they were."""
    settled(pipe, way)
    made(pipe, photo)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    expected, found = made(pipe, photo, height=512, width=512), []
    before = torch.cuda.memory_allocated()
    peak = torch.cuda.max_memory_reserved()
    for share in 0.2, 0.4, 0.6, 0.8:
        try:
            with at_most(share * peak):
                made(pipe, photo, height=512, width=512)
        except imvar.OutOfMemoryError as error:
            found.append(str(error))
        assert torch.cuda.memory_allocated() <= before + 2**20
        if way == "offload":
            assert {model.device.type for model in pipe.modules.values()} == {"cpu"}
    assert found
    assert all("height and width" in one for one in found)
    assert np.array_equal(made(pipe, photo, height=512, width=512), expected)


@pytest.mark.parametrize("way", [*WAYS, "compiled"])
def test_many_calls_leave_nothing(pipe, photo, way):
    settled(pipe, way)
    if way == "compiled":
        pipe.compile(backend="eager")
    held = []
    for i in range(24):
        with suppress(ZeroDivisionError):
            made(pipe, photo, seed=i, height=64 + 8 * (i % 2), callback=(lambda *_: 1 / 0) if i % 5 == 4 else None)
        held.append(torch.cuda.memory_allocated())
    assert max(held[12:]) <= max(held[:12]) + 2**20


def test_what_lies_on_another_device_is_brought_over(pipe, photo):
    """Latents and pictures, as in diffusers, and the noise of a generator of any device."""
    latents, picture = torch.randn(1, 4, 16, 16), pipe.feature_extractor(photo).pixel_values
    picture = torch.as_tensor(np.stack(picture))
    expected = made(pipe, picture, latents=latents, seed=None)
    assert np.array_equal(made(pipe, picture.cuda(), latents=latents.cuda(), seed=None), expected)
    pipe.to("cpu")
    assert np.abs(made(pipe, picture.cuda(), latents=latents.cuda(), seed=None) - expected).max() < 1e-3
    drawn = [
        made(pipe.to(device), picture, seed=None, generator=torch.Generator("cuda").manual_seed(0))
        for device in ("cpu", "cuda")
    ]
    assert np.abs(drawn[0] - drawn[1]).max() < 1e-3
