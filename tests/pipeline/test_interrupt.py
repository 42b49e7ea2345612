"""`interrupt()` from another thread, and `_interrupt = True` in a callback."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from imvar import DDIMScheduler, InputError, LMSDiscreteScheduler, PNDMScheduler


def run(pipe, *args, **options):
    return pipe(*args, **({"num_inference_steps": 6, "output_type": "latent", "seed": 1} | options)).images


def predictions(pipe, photo, **options):
    """The x_0 predicted in each step of a run."""
    seen = []

    def callback(_, i, t, tensors):
        seen.append(tensors["pred_original_sample"])

    names = ["pred_original_sample"]
    run(pipe, photo, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, **options)
    return seen


class Waiting:
    """A callback that waits in step `at` until another thread has gone on from there."""

    def __init__(self, at):
        self.at, self.steps = at, []
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, pipe, i, t, tensors):
        self.steps.append(i)
        if i == self.at:
            self.reached.set()
            assert self.go_on.wait(30)


@pytest.mark.parametrize("kind", [DDIMScheduler, PNDMScheduler, LMSDiscreteScheduler])
@pytest.mark.parametrize("at", [0, 2])
def test_an_interrupt_from_another_thread_ends_the_call_with_its_x0(pipe, photo, kind, at):
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    expected, plain = predictions(pipe, photo), run(pipe, photo)
    callback = Waiting(at)
    with ThreadPoolExecutor() as pool:
        result = pool.submit(run, pipe, photo, callback_on_step_end=callback)
        assert callback.reached.wait(30)
        pipe.interrupt()
        callback.go_on.set()
        interrupted = result.result(30)
    assert callback.steps[-1] == at
    assert torch.equal(interrupted, expected[at])
    assert torch.equal(run(pipe, photo), plain)


def test_all_calls_that_run_now_end_and_no_later_one(pipe, photo):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    other = copy.copy(pipe)
    expected, plain = predictions(pipe, photo), run(pipe, photo)
    callbacks = [Waiting(1), Waiting(3), Waiting(3)]
    with ThreadPoolExecutor() as pool:
        results = [
            pool.submit(run, pipe, photo, callback_on_step_end=callback)
            for pipe, callback in zip((pipe, pipe, other), callbacks, strict=True)
        ]
        for callback in callbacks:
            assert callback.reached.wait(30)
        pipe.interrupt()
        assert torch.equal(run(pipe, photo), plain)  # while these still run
        for callback in callbacks:
            callback.go_on.set()
        first, second, third = (result.result(30) for result in results)
    assert torch.equal(first, expected[1])
    assert torch.equal(second, expected[3])
    assert torch.equal(third, plain)  # of another pipeline with the same components
    assert [len(callback.steps) for callback in callbacks] == [2, 4, 6]


def test_without_a_call_nothing_happens(pipe, photo):
    expected = run(pipe, photo)
    pipe.interrupt()
    pipe._interrupt = True
    assert torch.equal(run(pipe, photo), expected)


def test_a_subclass_with_a_loop_of_its_own_reads_what_was_set(pipe):
    class Own(type(pipe)):
        @property
        def interrupt(self):
            return self._interrupt

        def __call__(self, callback):
            self._interrupt, steps = False, []
            for i in range(4):
                if self.interrupt:
                    continue
                steps.append(i)
                callback(self, i)
            return steps

    def stop(pipe, i):
        pipe._interrupt = i == 1

    own = Own(**pipe.components)
    assert [own(stop), own(stop)] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("way", ["callback", "callback_on_step_end", "method"])
def test_diffusers_idiom_in_a_callback(pipe, photo, way):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    expected, steps = predictions(pipe, photo), []

    def stop(i):
        steps.append(i)
        assert pipe._interrupt is False
        if i == 2 and way == "method":
            pipe.interrupt()
        elif i == 2:
            pipe._interrupt = True

    options = {"callback_on_step_end": lambda pipe, i, t, tensors: stop(i)}
    options = {"callback": lambda i, t, x: stop(i)} if way == "callback" else options
    assert torch.equal(run(pipe, photo, **options), expected[2])
    assert steps == [0, 1, 2]
    images = run(pipe, photo, **options, output_type="pt")
    with torch.no_grad():
        assert torch.equal(images, (pipe.decode(expected[2]) / 2 + 0.5).clamp(0, 1))


def test_the_idiom_of_another_thread(pipe, photo):
    pipe.scheduler, callback = DDIMScheduler.from_config(pipe.scheduler.config), Waiting(1)
    expected = predictions(pipe, photo)
    with ThreadPoolExecutor() as pool:
        result = pool.submit(run, pipe, photo, callback_on_step_end=callback)
        assert callback.reached.wait(30)
        pipe._interrupt = True
        callback.go_on.set()
        assert torch.equal(result.result(30), expected[1])


def test_a_call_within_a_callback_ends_alone(pipe, photo):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    expected, plain, inner = predictions(pipe, photo), run(pipe, photo), []

    def stop(*_):
        pipe._interrupt = True

    def call_within(i, *_):
        if i == 1:
            inner.append(run(pipe, photo, callback=stop))

    assert torch.equal(run(pipe, photo, callback=call_within), plain)
    assert torch.equal(inner[0], expected[0])


def test_an_interrupt_in_or_after_the_last_step_changes_nothing(pipe, photo):
    plain = run(pipe, photo)

    def stop(pipe, i, t, tensors):
        pipe._interrupt = i == pipe.num_timesteps - 1

    assert torch.equal(run(pipe, photo, callback_on_step_end=stop), plain)


def test_an_interrupt_before_the_first_step_finishes_that_step(pipe, photo):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    expected, encode = predictions(pipe, photo), pipe.encode_pixels
    pipe.encode_pixels = lambda *args: [pipe.interrupt(), encode(*args)][1]
    assert torch.equal(run(pipe, photo), expected[0])


def test_inpainting_that_is_interrupted_keeps_what_the_mask_keeps(pipe, photo):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    kept, mask = torch.randn(1, 4, 16, 16), torch.zeros(128, 128)
    mask[:, 64:] = 1
    seen = []

    def stop(pipe, i, t, tensors):
        seen.append(tensors["pred_original_sample"])
        pipe._interrupt = i == 1

    options = {"init_image": kept, "mask_image": mask, "callback_on_step_end": stop}
    made = run(pipe, photo, **options, callback_on_step_end_tensor_inputs=["pred_original_sample"])
    assert torch.equal(made, seen[1])
    assert torch.equal(made[..., :8], kept[..., :8])
    assert not torch.allclose(made[..., 8:], kept[..., 8:], atol=0.1)


def test_a_call_that_fails_is_not_running(pipe, photo):
    for _ in range(2):
        with pytest.raises(InputError):
            run(pipe, photo, height=7)
        with pytest.raises(ZeroDivisionError):
            run(pipe, photo, callback=lambda *_: 1 / 0)
    plain = run(pipe, photo)
    pipe.interrupt()
    assert torch.equal(run(pickle.loads(pickle.dumps(pipe)), photo), plain)
    assert pipe.num_timesteps == 0


def test_many_threads_interrupt_and_start_at_once(pipe, photo):
    """Every result is that of some step of the run, and the calls after the last interrupt are whole."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    possible = [*predictions(pipe, photo), run(pipe, photo)]
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(run, pipe, photo) for _ in range(12)]
        while not all(result.done() for result in results):
            pipe.interrupt()
    assert all(any(torch.equal(result.result(), x) for x in possible) for result in results)
    assert torch.equal(run(pipe, photo), possible[-1])
