"""`pipe.compile()`: the same pictures; compiled once per size, without a graph break, whatever the values are."""

import copy
import gc
import pickle
import shutil
import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

import imvar
from imvar import DDIMScheduler, LMSDiscreteScheduler, PNDMScheduler, StableDiffusionImageVariationPipeline
from imvar.cli.remake import set_switches
from imvar.errors import InputError
from imvar.kernels import autotune, polyphase
from imvar.kernels import cpu_kernels as cpu
from imvar.kernels.sdpa_backends import CANDIDATES, SDPAKernel, sdpa
from imvar.models.attention import SelfAttention
from imvar.models.ops import Conv2d, PackedWeights, executing, fastest, packed_weights
from imvar.runtime import compiled
from imvar.runtime.compiled import Compiler, CUDAGraphCall, graph_key, is_recordable, is_same_tensor
from imvar.runtime.precompute import Fingerprint
from tests.support.random_checkpoint import TINY_UNET, randomize, tiny_pipeline


class Counting:
    """A backend of `torch.compile` that runs the graph as it is and counts how many it was given."""

    graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _afresh():
    torch._dynamo.reset()


def simple_unet(*widths):
    """A UNet with attention in the middle only, which is compiled in half the time."""
    blocks = {"down_block_types": ("DownBlock2D",) * len(widths), "up_block_types": ("UpBlock2D",) * len(widths)}
    return randomize(imvar.UNet2DConditionModel(**TINY_UNET | blocks | {"block_out_channels": widths}), 2)


@pytest.fixture
def pipe(pipe):
    pipe.unet = simple_unet(16, 32)
    return pipe


def near(a, b):
    return (a - b).abs().max() <= 1e-4 * b.abs().max()  # after several steps, as beside the reference


def run(pipe, photo, seed=0, **options):
    options = {"num_inference_steps": 4, "output_type": "pt"} | options
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a fallback would be one
        return pipe(photo, generator=torch.Generator().manual_seed(seed), **options).images


def test_one_graph_for_every_seed_picture_guidance_sampler_and_number_of_steps(pipe, photo):
    calls = [{}, {"seed": 1}, {"guidance_scale": 3.0}, {"num_inference_steps": 7}, {"photo": photo.rotate(90)}]
    samplers = [
        kind.from_config(pipe.scheduler.config) for kind in (DDIMScheduler, LMSDiscreteScheduler, PNDMScheduler)
    ]

    def pictures():
        made = [run(pipe, **({"photo": photo} | call)) for call in calls]
        for pipe.scheduler in samplers:
            made.append(run(pipe, photo))
        return made

    plain, counting = pictures(), Counting()
    pipe.compile(backend=counting)
    assert all(map(near, pictures(), plain))
    assert counting.graphs == 2  # the UNet's step and the decoder, each in one piece


def test_another_size_is_compiled_once(pipe, photo):
    calls = [
        ({"num_images_per_prompt": 3}, 2),
        ({"height": 96}, 2),
        ({"guidance_interval": (0.25, 0.75)}, 1),  # the image alone is another batch
        ({"guidance_scale": 1.0}, 0),  # the same
        ({"cache_interval": 2}, 2),
    ]
    plain = [run(pipe, photo, **options) for options, _ in calls]
    counting, graphs = Counting(), 2
    pipe.compile(backend=counting)
    run(pipe, photo)
    for (options, more), expected in zip(calls, plain, strict=True):
        graphs += more
        for _ in range(2):
            assert near(run(pipe, photo, **options), expected)
            run(pipe, photo)
            assert counting.graphs == graphs


def test_freeu_slicing_and_weights_loaded_later_are_honoured(pipe, photo):
    other = copy.deepcopy(pipe.unet)
    for parameter in other.parameters():
        parameter.data.mul_(0.9)
    changes = [
        lambda p: None,
        lambda p: p.enable_freeu(0.9, 0.2, 1.2, 1.4),
        lambda p: p.enable_attention_slicing(1),
        lambda p: p.unet.load_state_dict(other.state_dict()),
        lambda p: p.disable_freeu(),
    ]
    plain, compiled = [], copy.deepcopy(pipe)
    compiled.compile(backend="aot_eager")
    for change in changes:
        change(pipe)
        change(compiled)
        plain.append(run(pipe, photo))
        assert near(run(compiled, photo), plain[-1])
    assert not near(plain[0], plain[-1])


def test_what_the_caller_and_callbacks_get_stays_theirs(pipe, photo):
    pipe.compile(backend="eager")
    seen = []
    first = run(pipe, photo, callback=lambda i, t, x: seen.append((x, x.clone())))
    kept = first.clone()
    run(pipe, photo, seed=1)
    assert torch.equal(first, kept)
    assert len(seen) == 4
    assert all(torch.equal(x, copied) for x, copied in seen)


def test_what_cannot_be_compiled_runs_with_one_line_of_warning_per_function(pipe, photo):
    def broken(graph, inputs):
        raise RuntimeError("no compiler\nis here")

    plain = run(pipe, photo)
    pipe.compile(backend=broken)
    for expected in 2, 0:  # the UNet and the decoder; the second time nothing is tried again
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            images = pipe(
                photo, num_inference_steps=4, output_type="pt", generator=torch.Generator().manual_seed(0)
            ).images
        bias = [str(w.message) for w in found if "compile" in str(w.message)]
        assert len(bias) == expected
        assert all("no compiler is here" in line and "\n" not in line for line in bias)
        assert torch.equal(images, plain)


def test_errors_of_the_model_itself_are_raised(pipe, photo):
    pipe.compile(backend="eager")
    run = pipe.runner(lambda unet, x: unet.conv_in(x), pipe.unet)
    with pytest.warns(UserWarning, match="compile"), pytest.raises(RuntimeError, match="channels"):
        run(torch.randn(1, 5, 8, 8))


def test_too_little_memory_is_no_fault_of_the_compiler():
    """The error is raised, nothing is said of the compiler, and the next call is a compiled one."""

    def double(model, x):
        return 2 * x

    compiler, short = Compiler(backend="eager"), [torch.OutOfMemoryError("full")]
    model, x = torch.nn.Identity(), torch.ones(1)
    assert torch.equal(compiler(double, model)(x), 2 * x)
    kept = compiler.compiled[double]

    def full(*inputs):
        if short:
            raise short.pop()
        return kept(*inputs)

    compiler.compiled[double] = full
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            compiler(double, model)(x)
    assert compiler.compiled[double] is full
    assert torch.equal(compiler(double, model)(x), 2 * x)


def test_layers_that_somebody_watches_are_not_compiled(pipe, photo):
    counting, seen = Counting(), []
    pipe.compile(backend=counting)
    pipe.unet.conv_in.register_forward_hook(lambda layer, inputs, out: seen.append(len(out)))
    run(pipe, photo)
    assert seen == [2] * 5  # PNDM visits one timestep twice
    assert counting.graphs == 1  # the decoder


def test_nothing_is_compiled_under_offloading(pipe, photo):
    counting, plain = Counting(), run(pipe, photo)
    pipe.compile(backend=counting)
    pipe.enable_model_cpu_offload(device="cpu")
    assert near(run(pipe, photo), plain)
    assert counting.graphs == 0


def test_from_pretrained_compiles_on_request(folder, photo, monkeypatch):
    kind = StableDiffusionImageVariationPipeline
    assert kind.from_pretrained(folder)._compiler is None
    assert kind.from_pretrained(folder, compile=False)._compiler is None
    assert isinstance(kind.from_pretrained(folder, compile=True)._compiler, Compiler)


def test_copies_compile_for_themselves(pipe, photo):
    pipe.compile(mode="max-autotune")
    for copied in copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe)):
        assert copied._compiler is not pipe._compiler
        assert copied._compiler.options == pipe._compiler.options
        assert copied._compiler.options["mode"] == "max-autotune-no-cudagraphs"  # imvar records its own


def test_cuda_graphs_compile_nothing_and_change_nothing_on_a_cpu(pipe, photo, monkeypatch):
    plain = run(pipe, photo)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    pipe.compile(backend="cudagraphs")
    for same in pipe, copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe)):
        assert same._compiler.options == {"backend": "cudagraphs"}
        assert torch.equal(run(same, photo), plain)
    record = pipe.records(photo, seed=0)[0]
    assert not [reason for reason in record["reasons"] if reason.startswith("compile")]
    assert record["pipeline"]["compiled"] == {"backend": "cudagraphs"}


def test_a_record_sets_cuda_graphs_again(pipe, monkeypatch):
    for recorded, options in (
        ({"backend": "cudagraphs", "mode": "max-autotune"}, {"backend": "cudagraphs"}),
        ({"backend": "custom", "dynamic": True}, {"fullgraph": True, "dynamic": True, "mode": None}),
    ):
        set_switches(pipe, {"compiled": recorded}, torch.device("cpu"))
        assert pipe._compiler.options == options


@pytest.mark.parametrize("option", [{"mode": "max-autotune"}, {"dynamic": False}, {"fullgraph": True}])
def test_cuda_graphs_take_no_other_option(pipe, option):
    with pytest.raises(
        InputError, match="compile: expected no other option with backend='cudagraphs', got .*" + next(iter(option))
    ):
        pipe.compile(backend="cudagraphs", **option)


def test_a_recording_holds_for_the_same_weights_and_settings(pipe):
    """The key that a recorded call is found again by; `tests/cuda` records."""
    before = graph_key(pipe.unet)
    assert graph_key(pipe.unet) == before
    for change in (
        lambda: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
        lambda: pipe.unet.set_attention_slice(1),
        lambda: setattr(pipe.unet.conv_in, "weight", copy.deepcopy(pipe.unet.conv_in.weight)),
        lambda: pipe.unet.to(torch.bfloat16),
    ):
        change()
        assert graph_key(pipe.unet) != before
        before = graph_key(pipe.unet)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)  # in place
    assert graph_key(pipe.unet) == before


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_pytorchs_own_compiler(pipe, photo, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # where nobody else, or somebody stopped, has written
    pipe.unet = simple_unet(16)
    plain = run(pipe, photo, output_type="latent")
    pipe.compile()
    assert near(run(pipe, photo, output_type="latent"), plain)


# What CUDA is asked for, without CUDA


class Replayed:
    """In place of a recording: the call, and what it was given."""

    def __init__(self, call, inputs, pool, done):
        self.call, self.shared, self.calls = call, (pool, done), 0

    def __call__(self, *inputs):
        self.calls += 1
        return self.call(*inputs)


class Done:
    def synchronize(self):
        pass


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Event", Done)
    monkeypatch.setattr(compiled, "CUDAGraphCall", Replayed)
    return Compiler(backend="eager")


def conv_in(unet, x, bias):
    return unet.conv_in(x) + bias[0]


@torch.no_grad()
def test_calls_are_recorded_once_for_each_size_and_state(pipe, recorder):
    unet, bias = pipe.unet, [torch.ones(())]
    for size, number in (8, 1), (8, 1), (16, 2), (8, 2):
        x = torch.randn(1, 4, size, size)
        made = recorder.replay(conv_in, unet, graph_key(unet), x, bias)
        assert torch.allclose(made, conv_in(unet, x, bias))
        assert len(recorder.graphs) == number
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    recorder.replay(conv_in, unet, graph_key(unet), x, bias)
    assert len(recorder.graphs) == 3
    (shared,) = {one.shared for one in recorder.graphs.values()}
    other = copy.deepcopy(unet)
    recorder.replay(conv_in, other, graph_key(other), x, bias)
    (recording,) = recorder.graphs.values()  # those of the model that it replaces are gone, and with them their pool
    assert recording.shared[0] is not shared[0]
    assert recording.shared[1] is shared[1]
    for size in range(8, 8 * (compiled.MAX_GRAPHS + 2), 8):
        recorder.replay(conv_in, other, graph_key(other), torch.randn(1, 4, size, 8), bias)
    assert len(recorder.graphs) == compiled.MAX_GRAPHS


@torch.no_grad()
def test_a_setting_of_pytorch_needs_a_recording_of_its_own(pipe, recorder):
    x, bias = torch.randn(1, 4, 8, 8), [torch.ones(())]
    before = torch.get_float32_matmul_precision()
    try:
        for precision, number in ("highest", 1), ("high", 2), ("highest", 2):
            torch.set_float32_matmul_precision(precision)
            recorder.replay(conv_in, pipe.unet, graph_key(pipe.unet), x, bias)
            assert len(recorder.graphs) == number
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.autocast("cpu", torch.bfloat16):
        recorder.replay(conv_in, pipe.unet, graph_key(pipe.unet), x, bias)
    assert len(recorder.graphs) == 3


@torch.no_grad()
def test_cuda_graphs_record_eager_calls_with_the_fastest_kernels(recorder, table, monkeypatch):
    def slow(x):
        return [x.sin() for _ in range(300)][-1]

    def quick(x):
        return 1.001 * x.sin()

    def answer(model, x):
        called_with.append(packed_weights())
        return fastest("test", (slow, quick), x)

    called_with = []
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    x, model, compiler = torch.ones(1000), torch.nn.Identity(), Compiler(backend="cudagraphs")
    with executing(packed=PackedWeights(2)):
        for _ in range(2):
            assert torch.equal(compiler.replay(answer, model, (), x), 1.001 * x.sin())
    assert len(compiler.graphs) == 1
    assert called_with[1:] == [None, None]  # after autotuning: weights packed for a run end with it


@torch.no_grad()
def test_what_cannot_be_recorded_is_called(pipe, recorder, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of graphs")

    monkeypatch.setattr(compiled, "CUDAGraphCall", broken)
    x, bias = torch.randn(1, 4, 8, 8), [torch.ones(())]
    with pytest.warns(UserWarning, match="cannot record this model on this machine.*out of graphs"):
        made = recorder.replay(conv_in, pipe.unet, graph_key(pipe.unet), x, bias)
    assert recorder.pool is None  # the next recording takes another
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(recorder.replay(conv_in, pipe.unet, graph_key(pipe.unet), x, bias), made)


@torch.no_grad()
def test_too_little_memory_for_a_recording_is_raised(pipe, recorder, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(compiled, "CUDAGraphCall", full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        recorder.replay(conv_in, pipe.unet, graph_key(pipe.unet), torch.randn(1, 4, 8, 8), [torch.ones(())])
    assert not recorder.graphs


def test_threads_take_turns(pipe, recorder, monkeypatch):
    running, most = [], []

    def watched(unet, x):
        running.append(1)
        most.append(len(running))
        x = unet.conv_in(x)
        running.pop()
        return x

    monkeypatch.setattr(recorder, "run", lambda function, model, *inputs: function(model, *inputs))
    work = [
        threading.Thread(
            target=lambda: [recorder.replay(watched, pipe.unet, (), torch.randn(1, 4, 8, 8)) for _ in range(20)]
        )
        for _ in range(4)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert max(most) == 1


@torch.no_grad()
def test_only_what_is_new_is_copied_in():
    recording = CUDAGraphCall.__new__(CUDAGraphCall)
    kept, x = torch.ones(3), torch.zeros(3)
    recording.inputs, recording.copied = [torch.empty(3), torch.empty(3)], [(lambda: None, None)] * 2
    recording.copy_inputs((kept, x))
    assert [t.tolist() for t in recording.inputs] == [[1, 1, 1], [0, 0, 0]]
    recording.inputs[0].fill_(7)  # to see whether it is written again
    recording.copy_inputs((kept, x + 2))
    assert [t.tolist() for t in recording.inputs] == [[7, 7, 7], [2, 2, 2]]
    kept.mul_(5)
    recording.copy_inputs((kept, x))
    assert recording.inputs[0].tolist() == [5, 5, 5]
    assert recording.copied[0][0]() is kept
    del kept
    gc.collect()
    assert recording.copied[0][0]() is None  # nothing is held for its sake
    with torch.inference_mode():
        assert not is_same_tensor(t := torch.ones(1), lambda: t, None)


# Trials


@pytest.fixture
def table(monkeypatch):
    found = {}
    monkeypatch.setattr(autotune, "_winners", found)
    return found


def test_the_quickest_way_is_found_and_compiled_in(table, monkeypatch):
    def slow(x):
        return [x.sin() for _ in range(300)][-1]

    def quick(x):
        return 1.001 * x.sin()  # to be bias from the other

    def wrong(x):
        return x.cos()

    def noise(x):
        return x.sin().where(x < 0, torch.nan)

    def gone(x):
        raise RuntimeError("no such operator")

    x, ways = torch.ones(1000), (slow, gone, wrong, noise, quick)

    def answer(x):
        return fastest("test", ways, x)

    assert torch.equal(answer(x), x.sin())
    assert not table
    with executing(autotune=True):
        assert torch.equal(answer(x), x.sin())  # what was there is the answer until it is compiled
    assert list(table.values()) == [4]
    assert torch.equal(answer(x), x.sin())
    compile = Compiler(backend="eager")(lambda model, x: answer(x), torch.nn.Identity())
    assert torch.equal(compile(x), 1.001 * x.sin())
    assert torch.equal(compile(x[:500]), x[:500].sin())  # a size that was not tried
    monkeypatch.setattr(autotune, "time_candidate", lambda way, *_: {slow: 1.0, quick: 0.99}.get(way, float("inf")))
    assert autotune.pick_fastest(ways, [x]) == 0  # too little to gain


def test_what_others_compile_may_change_its_size(pipe, table):
    """Where sizes are no longer numbers, no way for a size can be looked up."""
    unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    for side in 16, 24, 32, 16:
        x, context = torch.randn(1, 4, side, side), torch.randn(1, 3, 24)
        with torch.no_grad():
            assert near(unet(x, 7, context).sample, pipe.unet(x, 7, context).sample)
    assert not table


@pytest.mark.parametrize("way", range(len(CANDIDATES)))
def test_every_backend_is_compiled_in_one_piece(monkeypatch, way):
    """As it would be for CUDA: with tensors that claim to be there."""
    monkeypatch.setattr(autotune, "winner", torch.compiler.assume_constant_result(lambda key: way))
    there: dict = {"device": "cuda", "dtype": torch.float16}
    with FakeTensorMode():
        layer = SelfAttention(64, 4)
        for part in layer.modules():
            part._parameters.update(
                (name, torch.nn.Parameter(torch.empty(weight.shape, **there)))
                for name, weight in part._parameters.items()
                if weight is not None
            )
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error", UserWarning)  # a fallback would be one
            answer = Compiler(backend="eager").run(type(layer).forward, layer, torch.empty(2, 16, 64, **there))
    assert answer.shape == (2, 16, 64)


class SaysItIsThere(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("width", [4, 8, 12])
def test_a_backend_pads_heads_of_an_odd_width(width):
    q, k, v = torch.randn(3, 2, 4, 16, width).as_subclass(SaysItIsThere).unbind()
    answer = SDPAKernel(SDPBackend.MATH)(q, k, v)
    assert torch.allclose(answer, sdpa(q, k, v), atol=1e-5)


@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "CUDNN_ATTENTION"])
def test_a_backend_takes_the_dtypes_that_it_is_made_for(backend):
    q = torch.randn(1, 2, 16, 8).as_subclass(SaysItIsThere)
    with pytest.raises(
        imvar.InputTypeError, match=rf"attention_op: expected queries of .*float16.* for {backend}, got torch.float32"
    ):
        SDPAKernel(getattr(SDPBackend, backend))(q, q, q)


@torch.no_grad()
def test_every_way_gives_the_same_answer_when_compiled(pipe, table, photo, monkeypatch):
    plain = run(pipe, photo)
    monkeypatch.setattr(cpu, "MIN_PIXELS_UPSAMPLE", 10**9)  # else the CPU kernel is called
    with executing(autotune=True):
        run(pipe, photo)
    assert {key[0] for key in table} == {"attention", "upsample_conv"}
    table.update(dict.fromkeys(table, 1))
    pipe.compile(backend="aot_eager")
    assert near(run(pipe, photo), plain)


@torch.no_grad()
def test_upsampling_by_phases():
    conv, x = Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 5, 7)
    kernels, out = polyphase.phase_kernels(conv.weight), torch.empty(2, 8, 10, 14)
    out = polyphase.upsample_conv_by_phases(x, kernels, conv.bias, out)
    assert torch.allclose(out, conv(F.interpolate(x, scale_factor=2.0, mode="nearest")), atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3])
@torch.no_grad()
def test_torch_compile_of_the_unet_gives_one_graph(pipe, tokens):
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor(5), torch.randn(2, tokens, 24)
    compiled = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(compiled(x, t, context).sample, pipe.unet(x, t, context).sample)


class CountingMerge:
    """A merge whose weight depends on how often it was called."""

    calls = 0

    def __call__(self, h, skip, block):
        self.calls += 1
        return torch.cat([h, skip / self.calls], dim=1)


def test_graphs_depend_on_merges_and_are_not_recorded_of_those_that_may_count(pipe):
    unet, keys = pipe.unet, set()
    changes = [
        lambda: None,
        lambda: setattr(unet, "merge", CountingMerge()),
        lambda: setattr(unet, "merge", CountingMerge()),
        lambda: unet.enable_freeu(0.9, 0.2, 1.2, 1.4),
        lambda: unet.enable_freeu(0.9, 0.2, 1.2, 1.3),
    ]
    for change in changes:
        fingerprint = Fingerprint(unet)
        change()
        assert fingerprint.differs_from(unet) == (change is not changes[0])
        keys.add(graph_key(unet))
        assert is_recordable(unet) == (change is changes[0])
    assert len(keys) == len(changes)
    unet.merge.precomputable = True
    assert is_recordable(unet)
    assert is_recordable(tiny_pipeline().vae)


def test_a_merge_that_counts_and_is_set_in_a_callback(pipe, photo):
    def images(pipe):
        counting = CountingMerge()
        return run(pipe, photo, callback=lambda i, t, x: setattr(pipe.unet, "merge", counting) if i == 1 else None)

    plain, compiled_pipe = images(copy.deepcopy(pipe)), copy.deepcopy(pipe)
    compiled_pipe.compile(backend="eager")
    assert near(images(compiled_pipe), plain)
