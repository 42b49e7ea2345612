"""On CUDA: compiled, recorded and replayed, with the pictures of eager calls."""

import copy
import threading
import warnings

import pytest
import torch

import imvar
from imvar.image import clip_tensor
from imvar.kernels import autotune
from imvar.runtime import compiled
from tests.support.random_checkpoint import tiny_pipeline

DTYPES = [torch.float32, torch.float16]
BACKENDS = ["eager", "cudagraphs"]  # traced, and not traced; neither is compiled


@pytest.fixture
def pipe():
    pipe = tiny_pipeline().to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, photo, seed=0, **options):
    options = {"num_inference_steps": 4, "output_type": "pt"} | options
    shape = options.get("num_images_per_prompt", 1), 4, options.get("height", 128) // 8, 16
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return pipe(photo, latents=latents, **options).images


def exact(pipe, photo, **options):
    """The pictures in double precision, which nothing compiled has a part in."""
    wide = tiny_pipeline().to("cuda", torch.float64)
    wide.scheduler = pipe.scheduler
    wide.set_progress_bar_config(disable=True)
    return run(wide, photo, **options)


def near(found, eager, exact):
    """As near to the exact pictures as eager calls are, which take the same steps in another order."""
    return (found - exact).abs().max() <= 3 * (eager - exact).abs().max() + 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "LMSDiscreteScheduler"])
def test_recorded_runs_give_the_same_pictures(pipe, photo, dtype, scheduler, backend):
    pipe.to(dtype)
    pipe.scheduler = getattr(imvar, scheduler).from_config(pipe.scheduler.config)
    calls = [
        {},
        {"seed": 1},
        {"guidance_scale": 3.0},
        {"num_inference_steps": 7},
        {"photo": photo.rotate(90)},
        {"num_images_per_prompt": 3},
        {"height": 96},
        {"cache_interval": 2},
        {"guidance_interval": (0.25, 0.75)},
    ]
    calls = [{"photo": photo} | call for call in calls]
    expected = [(run(pipe, **call), exact(pipe, **call)) for call in calls]
    pipe.compile(backend=backend)
    for _ in range(2):
        for call, pictures in zip(calls, expected, strict=True):
            assert near(run(pipe, **call), *pictures), call
    assert all(isinstance(one, compiled.CUDAGraphCall) for one in pipe._compiler.graphs.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_runs_give_the_same_pictures(pipe, photo, dtype):
    expected = run(pipe.to(dtype), photo), exact(pipe, photo)
    autotune._winners.clear()
    pipe.compile()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a fallback would be one
        warnings.filterwarnings("ignore", "TensorFloat32")
        assert near(run(pipe, photo), *expected)
    assert {key[0] for key in autotune._winners} == {"attention", "upsample_conv"}
    assert all(isinstance(one, compiled.CUDAGraphCall) for one in pipe._compiler.graphs.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_records_once_for_any_values(pipe, photo, backend):
    pipe.compile(backend=backend)
    run(pipe, photo)
    recorded = list(pipe._compiler.graphs)
    run(pipe, photo, seed=7, num_inference_steps=9, guidance_scale=2.0)
    assert list(pipe._compiler.graphs) == recorded
    assert len(recorded) == 2  # the UNet's step and the decoder


@pytest.mark.parametrize("backend", BACKENDS)
def test_recorded_in_inference_mode_and_replayed_outside(pipe, photo, backend):
    pipe.compile(backend=backend)
    with torch.inference_mode():
        first = run(pipe, photo)
    recorded = list(pipe._compiler.graphs)
    assert (run(pipe, photo) - first).abs().max() < 1e-3
    assert list(pipe._compiler.graphs) == recorded


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_unet_is_recorded_in_place_of_the_first(pipe, photo, backend):
    pipe.compile(backend=backend)
    for _ in range(2):
        run(pipe, photo, output_type="latent")  # the UNet alone, whose graph is the only one
        (recording,) = pipe._compiler.graphs.values()
        assert isinstance(recording, compiled.CUDAGraphCall)
        pipe.unet = copy.deepcopy(pipe.unet)


@pytest.mark.parametrize("backend", BACKENDS)
def test_freeu_is_recorded(pipe, photo, backend):
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    eager = run(pipe, photo)
    pipe.compile(backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a fallback would be one
        assert (run(pipe, photo) - eager).abs().max() < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_callers_get_is_theirs(pipe, photo, backend):
    pipe.compile(backend=backend)
    seen = []
    first = run(pipe, photo, callback=lambda i, t, x: seen.append((x, x.clone())))
    kept = first.clone()
    run(pipe, photo, seed=1)
    assert torch.equal(first, kept)
    assert all(torch.equal(x, copy) for x, copy in seen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_written_to_and_weights_replaced_count(pipe, photo, backend):
    pipe.compile(backend=backend)
    run(pipe, photo)
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(0.5)
    for _ in range(2):
        made = run(pipe, photo)
        pipe._compiler, compiler = None, pipe._compiler
        assert (made - run(pipe, photo)).abs().max() < 1e-3
        pipe._compiler = compiler
        pipe.unet.conv_in.weight = torch.nn.Parameter(pipe.unet.conv_in.weight * 1.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_step_waits_for_the_device(pipe, photo, backend):
    """Nothing in the loop asks the host, compiled or not."""
    for _ in range(2):
        run(pipe, photo, output_type="latent")
        predict = pipe.predictor(torch.tensor([500, 1]), torch.randn(2, 1, 24, device="cuda"))
        scheduler = imvar.DDIMScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(2)
        x = torch.randn(1, 4, 16, 16, device="cuda")
        predict(x, 0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for i, t in enumerate(scheduler.timesteps):
                x = scheduler.step(predict(x, i).chunk(2)[1], t, x).prev_sample
        finally:
            torch.cuda.set_sync_debug_mode("default")
        pipe.compile(backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_share_recordings(pipe, photo, backend):
    expected = [(run(pipe, photo, seed=seed), exact(pipe, photo, seed=seed)) for seed in range(4)]
    pipe.compile(backend=backend)
    made = {}

    def work(seed):
        with torch.cuda.stream(torch.cuda.Stream()):
            made[seed] = [run(pipe, photo, seed=seed).cpu().cuda() for _ in range(3)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        for one in made[seed]:
            assert near(one, *expected[seed])


@pytest.mark.parametrize("size", [(512, 512), (512, 768), (64, 64), (1024, 320)])
def test_pictures_are_prepared_for_the_checker_as_by_pillow(size):
    levels = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    processor = imvar.CLIPImageProcessor()
    assert clip_tensor.supports(levels.cuda(), processor.config)
    assert torch.equal(processor.preprocess_uint8(levels.cuda()).cpu(), processor.preprocess_uint8(levels))


@torch.no_grad()
def test_many_pictures_take_no_more_memory_than_the_unet(photo):
    pipe = tiny_pipeline().to("cuda")
    pipe.set_progress_bar_config(disable=True)
    peaks = []
    for number in 1, 1, 4:
        torch.cuda.reset_peak_memory_stats()
        pictures = pipe.decode(torch.randn(number, 4, 64, 64, device="cuda"))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] <= peaks[1] + 2 * pictures.nbytes  # themselves, one by one and together


def test_a_merge_that_counts_its_calls(photo):
    images = []
    for compiled_run in (False, True):
        pipe, calls = tiny_pipeline().to("cuda"), []
        if compiled_run:
            pipe.compile(backend="eager")

        def merge(h, skip, block, calls=calls):
            calls.append(block)
            return torch.cat([h, skip / len(calls)], dim=1)

        pipe.unet.merge = merge
        images.append(run(pipe, photo))
    assert (images[0] - images[1]).abs().max() <= 1e-4
