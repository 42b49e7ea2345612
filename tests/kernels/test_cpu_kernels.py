"""The faster CPU kernels equal PyTorch's, and are called only where they apply."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imvar.kernels import cpu_kernels as cpu
from imvar.kernels import winograd
from imvar.kernels.packed_weights import PackedWeights
from imvar.models.layers import Upsample
from imvar.models.ops import Conv2d, GroupNorm, Linear, add_conv, executing, packing
from imvar.models.ops import packed_weights as active
from imvar.runtime.precompute import PrecomputedUNet

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest output


def near(found, expected):
    limit = TOLERANCE[found.dtype] * expected.abs().max()
    return found.dtype == expected.dtype and found.shape == expected.shape and (found - expected).abs().max() <= limit


@pytest.fixture
def called(monkeypatch):
    """The names of the faster kernels that were called."""
    names = []
    for dtype in TOLERANCE:
        cpu.has_onednn_linear(dtype)
    for kernel in cpu.onednn_linear, cpu.upsample_conv:

        def watching(*args, kernel=kernel):
            names.append(kernel.__name__)
            return kernel(*args)

        monkeypatch.setattr(cpu, kernel.__name__, watching)
    return names


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 512, 320), (640, 320), (3, 5, 64, 320)])
@torch.no_grad()
def test_linear(called, dtype, bias, shape):
    layer, x = Linear(320, 256, bias=bias).to(dtype), torch.randn(shape).to(dtype)
    assert near(layer(x), F.linear(x, layer.weight, layer.bias))
    assert called == (["onednn_linear"] if cpu.has_onednn_linear(dtype) else [])


@torch.no_grad()
def test_linear_with_strided_inputs_and_weights():
    layer, x = Linear(320, 256), torch.randn(2, 320, 512).transpose(1, 2)
    assert near(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.weight = nn.Parameter(torch.randn(320, 256).T)
    assert near(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "h", "w"), [(1, 32, 32), (2, 17, 31), (3, 512, 1), (1, 1, 700), (512, 1, 1)])
@torch.no_grad()
def test_upsample(called, dtype, n, h, w):
    torch.manual_seed(0)
    layer, x = Upsample(8).to(dtype), torch.randn(n, 8, h, w).to(dtype)
    expected = layer.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    for size in None, (2 * h, 2 * w), torch.Size([2 * h, 2 * w]):
        assert near(layer(x, size), expected)
    assert near(layer(x.to(memory_format=torch.channels_last)), expected)
    assert called == 4 * ["upsample_conv"]
    assert layer(x, (2 * h - 1, 2 * w)).shape == (n, 8, 2 * h - 1, 2 * w)
    assert len(called) == 4


def test_gradients_use_the_plain_kernels(called):
    layer, x = Linear(320, 256), torch.randn(640, 320, requires_grad=True)
    layer(x).sum().backward()
    grow = Upsample(8)
    grow(torch.randn(1, 8, 32, 32)).sum().backward()
    assert not called
    assert x.grad is not None
    assert grow.conv.weight.grad is not None


@torch.no_grad()
def test_autocast_hooks_and_custom_convolutions_use_the_plain_kernels(called):
    x, grow, seen = torch.randn(1, 8, 32, 32), Upsample(8), []
    with torch.autocast("cpu", torch.bfloat16):
        assert Linear(320, 256)(torch.randn(640, 320)).dtype == torch.bfloat16
        grow(x)
    hook = grow.conv.register_forward_hook(lambda layer, inputs, out: seen.append(out.shape))
    grow(x)
    assert seen == [(1, 8, 64, 64)]
    hook.remove()
    grow.conv = nn.Sequential(grow.conv, nn.Identity())
    assert grow(x).shape == (1, 8, 64, 64)
    assert not called


@pytest.mark.filterwarnings("ignore:TF32")  # a warning of PyTorch about its own flags
@torch.no_grad()
def test_without_onednn(called, monkeypatch):
    layer, x = Linear(320, 256), torch.randn(640, 320)
    with torch.backends.mkldnn.flags(enabled=False):
        layer(x)
    assert not called
    monkeypatch.setattr(cpu, "onednn_linear", lambda *_: torch.ops.mkldnn.gone())
    cpu.has_onednn_linear.cache_clear()
    try:
        assert not cpu.has_onednn_linear(torch.float32)
        assert near(layer(x), F.linear(x, layer.weight, layer.bias))
    finally:
        cpu.has_onednn_linear.cache_clear()


# Runs


@pytest.fixture
def any_size(monkeypatch):
    """Use the kernels for large layers in layers of any size."""
    for limit in "MIN_MACS", "MIN_PIXELS_CHANNELS_LAST", "MIN_PIXELS_UPSAMPLE", "MIN_CHANNELS_WINOGRAD":
        monkeypatch.setattr(cpu, limit, 0)
    monkeypatch.setattr(cpu, "MAX_PIXELS_PER_SUM", 12)
    monkeypatch.setattr(winograd, "MAX_PIXELS_PER_MATMUL", 8)
    monkeypatch.setattr(winograd, "MAX_CHANNELS_PER_TRANSFORM", 3)


@pytest.fixture
def fast_convs(monkeypatch):
    """The names of the faster convolutions that were called."""
    names = []
    for dtype in TOLERANCE:
        cpu.has_onednn_linear(dtype)
    for module, name in (winograd, "winograd_conv2d"), (winograd, "winograd_upsample_conv"), (cpu, "im2col_conv2d"):
        real = getattr(module, name)

        def watching(*args, name=name, real=real):
            names.append(name)
            return real(*args)

        monkeypatch.setattr(module, name, watching)
    return names


@pytest.mark.parametrize(("n", "h", "w"), [(1, 2, 2), (2, 6, 4), (3, 64, 32), (1, 2, 3000), (1, 130, 128), (5, 46, 46)])
@pytest.mark.parametrize("bias", [True, False])
def test_winograd_is_exact(n, h, w, bias):
    """In double precision, whose rounding errors are far below any error of the algorithm."""
    torch.manual_seed(0)
    x, kernel = torch.randn(n, h, w, 3, dtype=torch.float64), torch.randn(5, 3, 3, 3, dtype=torch.float64)
    shift = torch.randn(5, dtype=torch.float64) if bias else None
    for way, matrices, expected in (
        (winograd.winograd_conv2d, winograd.transform_filter, x.permute(0, 3, 1, 2)),
        (
            winograd.winograd_upsample_conv,
            winograd.transform_upsample_filter,
            F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0),
        ),
    ):
        made = way(x, matrices(kernel), shift, F.linear).permute(0, 3, 1, 2)
        assert (made - F.conv2d(expected, kernel, shift, padding=1)).abs().max() <= 1e-12


@torch.no_grad()
def test_rounding_error_of_winograd():
    torch.manual_seed(0)
    x, kernel = torch.randn(2, 320, 16, 16), torch.randn(320, 320, 3, 3) / 54
    exact = F.conv2d(x.double(), kernel.double(), padding=1)
    made = winograd.winograd_conv2d(x.permute(0, 2, 3, 1), winograd.transform_filter(kernel), None, F.linear)
    errors = [
        (found - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        for found in (made.permute(0, 3, 1, 2), F.conv2d(x, kernel, padding=1))
    ]
    assert errors[0] <= min(4 * errors[1], 2e-6)  # that of the direct convolution depends on the processor


@pytest.mark.parametrize("offset", [0.0, 5.0, -30.0])
@pytest.mark.parametrize(("n", "c", "h", "w"), [(2, 32, 16, 16), (1, 64, 128, 96), (3, 32, 97, 1), (1, 96, 1, 1)])
@torch.no_grad()
def test_precision_of_group_norm(any_size, monkeypatch, n, c, h, w, offset):
    torch.manual_seed(0)
    monkeypatch.setattr(cpu, "MAX_PIXELS_PER_SUM", 2**11)
    norm, x = GroupNorm(32, c), (torch.randn(n, c, h, w) + offset).to(memory_format=torch.channels_last)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    exact = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double())
    usual = (norm(x.contiguous()) - exact).abs().max()
    with executing(packed=PackedWeights()):
        assert (norm(x) - exact).abs().max() <= max(10 * usual, 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"padding": 0},
        {"dilation": 2, "padding": 2},
        {"groups": 2},
        {"bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(8, 6), (7, 6), (8, 5)])
@torch.no_grad()
def test_convolutions_in_a_run(any_size, fast_convs, dtype, options, size):
    layer = Conv2d(8, 6, 3, **({"padding": 1} | options)).to(dtype)
    x = torch.randn(2, 8, *size).to(dtype)
    expected = layer(x)
    assert not fast_convs
    with executing(packed=PackedWeights()):
        for given in x, x.to(memory_format=torch.channels_last):
            assert near(layer(given), expected)
    if dtype == torch.float32 and not options.keys() - {"bias"} and size == (8, 6):
        assert fast_convs == 2 * ["winograd_conv2d"]
    else:
        applies = cpu.has_onednn_linear(dtype) and not options.keys() & {"dilation", "groups"}
        assert fast_convs == (2 * ["im2col_conv2d"] if applies else [])


needs_bfloat16 = pytest.mark.skipif(not cpu.has_onednn_add_conv(), reason="needs AVX-512")


@needs_bfloat16
@torch.no_grad()
def test_a_convolution_and_its_residual_are_rounded_once():
    torch.manual_seed(0)
    conv = Conv2d(32, 32, 3, padding=1).to(torch.bfloat16)
    x, residual = torch.randn(2, 2, 32, 48, 32).to(torch.bfloat16)
    exact = residual.double() + F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    with executing(packed=PackedWeights(2)):
        found = add_conv(conv, x, lambda: residual)
    assert rms(found - exact) < 1.001 * rms(exact.bfloat16() - exact)  # that of a single rounding
    plain = add_conv(conv, x, lambda: residual)
    assert rms(plain - exact) > 1.1 * rms(found - exact)
    assert near(found, plain)


@needs_bfloat16
@torch.no_grad()
def test_residuals_that_are_added_by_themselves(monkeypatch):
    """In float32, of few pixels, of another shape or dtype, after custom convolutions, and without a run."""
    monkeypatch.setattr(cpu, "add_conv", lambda *_: pytest.fail("added while convolving"))
    conv = Conv2d(8, 8, 3, padding=1).to(torch.bfloat16)
    x = torch.randn(1, 8, 64, 64).to(torch.bfloat16)
    assert torch.equal(add_conv(conv, x, lambda: x), x + conv(x))
    with executing(packed=PackedWeights(2)):
        for layer, image, residual in [
            (Conv2d(8, 8, 3, padding=1), x.float(), x.float()),
            (conv, x[..., :4], x[..., :4]),
            (conv, x, x[:, :1]),
            (conv, x, x.float()),
            (Conv2d(8, 8, 3, padding=1, padding_mode="circular").to(torch.bfloat16), x, x),
            (nn.Conv2d(8, 8, 3, padding=1).to(torch.bfloat16), x, x),
        ]:
            assert torch.equal(add_conv(layer, image, lambda residual=residual: residual), residual + layer(image))
        with torch.backends.mkldnn.flags(enabled=False):
            add_conv(conv, x, lambda: x)


def rms(x):
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_im2col_is_for_large_layers_on_few_pixels(fast_convs, dtype):
    if not cpu.has_onednn_linear(dtype):
        pytest.skip("this processor has no instructions for it, and convolves 512 channels in half a minute")
    with executing(packed=PackedWeights()):
        for channels, side, fast in (512, 8, True), (16, 8, False), (512, 32, False):
            layer = Conv2d(channels, channels, 3, padding=1).to(dtype)
            x = torch.randn(1, channels, side, side).to(dtype)
            assert near(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
            assert fast_convs == (["im2col_conv2d"] if fast else [])
            fast_convs.clear()


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_upsampling_in_a_run(any_size, fast_convs, dtype):
    grow, x = Upsample(8).to(dtype), torch.randn(2, 8, 5, 6).to(dtype)
    expected = grow.conv(F.interpolate(x, scale_factor=2.0))
    with executing(packed=PackedWeights()):
        assert near(grow(x), expected)
    assert fast_convs == (["winograd_upsample_conv"] if dtype == torch.float32 else [])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("side", [8, 64])
@torch.no_grad()
def test_memory_format_of_convolutions_in_a_run(dtype, side):
    layer, x = Conv2d(4, 4, 3, padding=1).to(dtype), torch.randn(1, 4, side, side).to(dtype)
    with executing(packed=PackedWeights()):
        for given in x, x.to(memory_format=torch.channels_last):
            output = layer(given)
            assert near(output, F.conv2d(x, layer.weight, layer.bias, padding=1))
            assert cpu.is_channels_last(output) == (side == 64)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("h", "w"), [(8, 8), (16, 6), (7, 5)])
@torch.no_grad()
def test_whole_models_in_a_run(pipe, any_size, fast_convs, dtype, h, w):
    """With the faster kernel in every layer; the outputs are contiguous."""
    torch.manual_seed(0)
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    x, context, times = torch.randn(2, 4, h, w).to(dtype), torch.randn(4, 1, 24).to(dtype), torch.tensor([500.0])
    image = torch.randn(2, 3, 8 * h, 8 * w).to(dtype)
    pipe.to(dtype=dtype)
    exact = {name: copy.deepcopy(pipe.components[name]).double() for name in ("unet", "vae")}

    def rms_error(output, expected):
        return (output - expected).square().mean().sqrt()

    def check(output, plain, expected):
        assert near(output, plain) or rms_error(output, expected) <= 1.2 * rms_error(plain, expected)

    both = x.repeat(2, 1, 1, 1)
    output = PrecomputedUNet(pipe.unet, times, context)(x, 0)
    expected = exact["unet"](both.double(), times, context.double()).sample
    check(output, pipe.unet(both, times, context).sample, expected)
    assert output.is_contiguous()
    for name, z in ("decode", x), ("encode", image):
        call = getattr(pipe.vae, name)
        handle = getattr(pipe.vae, name + "r").register_forward_hook(lambda *_: None)
        fast_convs.clear()
        plain = call(z, return_dict=False)[0]
        assert not fast_convs  # because of the hook
        handle.remove()
        output, expected = call(z, return_dict=False)[0], getattr(exact["vae"], name)(z.double(), return_dict=False)[0]
        assert fast_convs or dtype == torch.bfloat16
        if name == "encode":
            output, plain, expected = output.mean, plain.mean, expected.mean
        check(output, plain, expected)
        assert output._base is not None or output.is_contiguous()


@torch.no_grad()
def test_slices_and_tiles_share_a_run(pipe, any_size, monkeypatch):
    made = []
    monkeypatch.setattr(cpu, "pack_filters", lambda *args, real=cpu.pack_filters: made.append(args[0]) or real(*args))
    z = torch.randn(3, 4, 16, 16)
    whole = pipe.vae.decode(z).sample
    once = len(made)
    pipe.vae.enable_slicing()
    assert near(pipe.vae.decode(z).sample, whole)
    assert len(made) == 2 * once
    pipe.vae.enable_tiling()
    pipe.vae.decode(z)
    assert len(made) == 3 * once


@torch.no_grad()
def test_packed_weights_are_kept_during_a_run():
    made = []

    def make(weight, *how):
        made.append(how)
        return weight * 2

    weight, kept = nn.Parameter(torch.ones(2)), PackedWeights(3)
    assert active() is None
    single = PackedWeights()
    assert torch.equal(single.get(make, weight), single.get(make, weight))
    assert made == [(), ()]
    assert not single.cache  # nothing is kept for a single pass
    made.clear()
    with executing(packed=kept):
        assert active() is kept
        with executing(packed=PackedWeights()):
            assert active() is not kept
        assert active() is kept
    assert active() is None
    for _ in range(2):
        assert torch.equal(kept.get(make, weight), torch.full((2,), 2.0))
    assert torch.equal(kept.get(make, weight, 7), torch.full((2,), 2.0))
    assert made == [(), (7,)]
    weight.mul_(3)  # in place
    assert torch.equal(kept.get(make, weight), torch.full((2,), 6.0))
    assert torch.equal(kept.get(make, nn.Parameter(torch.zeros(2))), torch.zeros(2))


def test_no_run_with_hooks_or_gradients(pipe):
    with packing(pipe.vae):
        assert active() is None  # gradients
    with torch.no_grad(), packing(pipe.vae, calls=5):
        assert active().calls == 5
        with packing(pipe.unet):
            assert active().calls == 5  # of which this is a part
    pipe.vae.decoder.conv_in.register_forward_hook(lambda *_: None)
    with torch.no_grad(), packing(pipe.vae):
        assert active() is None
    with torch.no_grad(), packing(pipe.unet), torch.enable_grad():
        layer = pipe.unet.conv_out
        layer(torch.randn(1, 16, 8, 8)).sum().backward()
        assert layer.weight.grad is not None


@torch.no_grad()
def test_weights_changed_between_steps_count(pipe, any_size):
    x, context, times = torch.randn(1, 4, 8, 8), torch.randn(2, 1, 24), torch.tensor([500.0, 1.0])
    prepared = PrecomputedUNet(pipe.unet, times, context)
    prepared(x, 0)
    for block in pipe.unet.mid_block.resnets:
        block.conv1.weight.mul_(1.5)
    pipe.unet.conv_in.weight = nn.Parameter(pipe.unet.conv_in.weight * 2)
    assert near(prepared(x, 0), pipe.unet(x.repeat(2, 1, 1, 1), times[0], context).sample)


@pytest.mark.filterwarnings("ignore:TF32")
@torch.no_grad()
def test_runs_without_onednn(pipe, any_size):
    x, context, times = torch.randn(1, 4, 8, 8), torch.randn(2, 1, 24), torch.tensor([500.0])
    for dtype in TOLERANCE:
        unet = copy.deepcopy(pipe.unet).to(dtype)
        with torch.backends.mkldnn.flags(enabled=False):
            plain = unet(x.repeat(2, 1, 1, 1).to(dtype), times, context.to(dtype)).sample
            assert near(PrecomputedUNet(unet, times, context.to(dtype))(x.to(dtype), 0), plain)


ODD = {
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "1x1": {"kernel_size": 1},
    "5x5": {"kernel_size": 5, "padding": 2},
    "grouped": {"padding": 1, "groups": 4},
    "dilated": {"padding": 2, "dilation": 2},
    "same": {"padding": "same"},
    "strided": {"padding": 1, "stride": 2},
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", ODD.values(), ids=ODD)
@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2d])
@torch.no_grad()
def test_custom_convolutions(any_size, kind, options, dtype):
    """Other paddings, as for seamless images, kernels, groups and dilations compute what PyTorch does."""
    torch.manual_seed(0)
    options = {"kernel_size": 3} | options
    grow, x = Upsample(32).to(dtype), torch.randn(1, 32, 16, 16).to(dtype)
    grow.conv = kind(32, 32, **options).to(dtype)
    plain = nn.Conv2d(32, 32, **options).to(dtype)
    plain.load_state_dict(grow.conv.state_dict())
    large = F.interpolate(x, scale_factor=2.0, mode="nearest")
    assert near(grow(x), plain(large))
    with packing(grow, 50):
        assert near(grow(x), plain(large))
        assert near(grow.conv(x), plain(x))


@torch.no_grad()
def test_convolutions_changed_in_place(any_size):
    """As libraries do: its padding_mode is set, or its _conv_forward replaced."""

    def twice(input, weight, bias):
        return 2 * F.conv2d(input, weight, bias, padding=1)

    for change in ({"padding_mode": "circular", "_reversed_padding_repeated_twice": [1] * 4}, {"_conv_forward": twice}):
        grow, x = Upsample(32), torch.randn(1, 32, 16, 16)
        vars(grow.conv).update(change)
        expected = nn.Conv2d.forward(grow.conv, F.interpolate(x, scale_factor=2.0, mode="nearest"))
        assert near(grow(x), expected)
        with packing(grow, 50):
            assert near(grow(x), expected)
            assert near(grow.conv(x), nn.Conv2d.forward(grow.conv, x))


@torch.no_grad()
def test_traced():
    for layer, x in (Linear(1024, 1024), torch.randn(64, 1024)), (Upsample(64), torch.randn(1, 64, 32, 32)):
        traced = torch.jit.trace(layer, x)
        assert near(traced(x), layer(x))
