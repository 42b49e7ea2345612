"""The CPU's quicker kernels beside the plain ones: the same answers, where they may be asked, and only there."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imvar.models import cpu
from imvar.models.layers import Linear, Upsample

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest answer


def near(found, expected):
    limit = TOLERANCE[found.dtype] * expected.abs().max()
    return found.dtype == expected.dtype and found.shape == expected.shape and (found - expected).abs().max() <= limit


@pytest.fixture
def asked(monkeypatch):
    """The names of the quicker kernels that were asked."""
    names = []
    for dtype in TOLERANCE:
        cpu.has_onednn(dtype)
    for kernel in cpu.onednn_linear, cpu.upsample_in_phases:
        def watching(*args, kernel=kernel):
            names.append(kernel.__name__)
            return kernel(*args)

        monkeypatch.setattr(cpu, kernel.__name__, watching)
    return names


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 512, 320), (640, 320), (3, 5, 64, 320)])
@torch.no_grad()
def test_linear(asked, dtype, bias, shape):
    layer, x = Linear(320, 256, bias=bias).to(dtype), torch.randn(shape).to(dtype)
    assert near(layer(x), F.linear(x, layer.weight, layer.bias))
    assert asked == (["onednn_linear"] if cpu.has_onednn(dtype) else [])


@torch.no_grad()
def test_linear_of_what_lies_otherwise_in_memory():
    layer, x = Linear(320, 256), torch.randn(2, 320, 512).transpose(1, 2)
    assert near(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.weight = nn.Parameter(torch.randn(320, 256).T)
    assert near(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "h", "w"), [(1, 32, 32), (2, 17, 31), (3, 512, 1), (1, 1, 700), (512, 1, 1)])
@torch.no_grad()
def test_upsample(asked, dtype, n, h, w):
    torch.manual_seed(0)
    layer, x = Upsample(8).to(dtype), torch.randn(n, 8, h, w).to(dtype)
    expected = layer.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    for size in None, (2 * h, 2 * w), torch.Size([2 * h, 2 * w]):
        assert near(layer(x, size), expected)
    assert near(layer(x.to(memory_format=torch.channels_last)), expected)
    assert asked == 4 * ["upsample_in_phases"]
    assert layer(x, (2 * h - 1, 2 * w)).shape == (n, 8, 2 * h - 1, 2 * w)
    assert len(asked) == 4


def test_gradients_go_the_plain_way(asked):
    layer, x = Linear(320, 256), torch.randn(640, 320, requires_grad=True)
    layer(x).sum().backward()
    grow = Upsample(8)
    grow(torch.randn(1, 8, 32, 32)).sum().backward()
    assert not asked
    assert x.grad is not None
    assert grow.conv.weight.grad is not None


@torch.no_grad()
def test_autocast_and_watched_or_foreign_convolutions_go_the_plain_way(asked):
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
    assert not asked


@pytest.mark.filterwarnings("ignore:TF32")  # what PyTorch says to its own flags
@torch.no_grad()
def test_where_onednn_is_switched_off_or_gone(asked, monkeypatch):
    layer, x = Linear(320, 256), torch.randn(640, 320)
    with torch.backends.mkldnn.flags(enabled=False):
        layer(x)
    assert not asked
    monkeypatch.setattr(cpu, "onednn_linear", lambda *_: torch.ops.mkldnn.gone())
    cpu.has_onednn.cache_clear()
    try:
        assert not cpu.has_onednn(torch.float32)
        assert near(layer(x), F.linear(x, layer.weight, layer.bias))
    finally:
        cpu.has_onednn.cache_clear()
