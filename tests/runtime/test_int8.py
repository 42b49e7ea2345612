"""Int8 layers: approximate, for CPUs, undone, and in full precision wherever their kernels do not apply."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn.utils import prune

from imvar import InputError
from imvar.kernels.int8_kernels import has_int8_kernels, quantize_sample
from imvar.models.ops import Conv2d, Linear
from imvar.runtime import fp8, int8
from imvar.runtime.fp8 import Fp8Linear
from imvar.runtime.int8 import Int8Conv2d, Int8Layer, Int8Linear
from tests.support.random_checkpoint import tiny_pipeline

DTYPES = [torch.float32, torch.bfloat16]
needs_kernels = pytest.mark.skipif(not has_int8_kernels(), reason="needs VNNI or AMX instructions")


def run(pipe, photo, **options):
    return pipe(photo, **({"num_inference_steps": 4, "output_type": "latent", "seed": 0} | options)).images


def int8_layers(pipe):
    return [layer for layer in pipe.unet.modules() if isinstance(layer, Int8Layer)]


@needs_kernels
def test_int8_rounds_a_little_and_is_undone(pipe, photo):
    exact, state = run(pipe, photo), {name: t.clone() for name, t in pipe.unet.state_dict().items()}
    pipe.enable_int8()
    pipe.enable_int8()  # again, which changes nothing
    kinds = [type(layer) for layer in int8_layers(pipe)]
    assert kinds.count(Int8Linear) == 6 * 4  # four of self-attention and two of feed-forward, of four blocks
    assert kinds.count(Int8Conv2d) == 2 * 8 + 1  # two of each resnet block, one of downsampling
    assert list(pipe.unet.state_dict()) == list(state)
    assert all(torch.equal(t, state[name]) for name, t in pipe.unet.state_dict().items())
    rounded = run(pipe, photo)
    assert 1e-4 < (rounded - exact).abs().mean() / exact.abs().mean() < 0.2
    pipe.disable_int8()
    assert not int8_layers(pipe)
    assert torch.equal(run(pipe, photo), exact)


def tokens(scale=1.0):
    return scale * torch.randn(3, 50, 48, generator=torch.Generator().manual_seed(1))


def feature_map(scale=1.0):
    return scale * torch.randn(3, 48, 9, 7, generator=torch.Generator().manual_seed(1))


LAYERS = {
    "linear": (Int8Linear, lambda: Linear(48, 24), tokens),
    "no bias": (Int8Linear, lambda: Linear(48, 24, bias=False), tokens),
    "convolution": (Int8Conv2d, lambda: Conv2d(48, 24, 3, padding=1), feature_map),
    "strided": (Int8Conv2d, lambda: Conv2d(48, 24, 3, stride=2, padding=(0, 1)), feature_map),
    "grouped": (Int8Conv2d, lambda: Conv2d(48, 24, 3, groups=2, dilation=2), feature_map),
}


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_layer_in_int8_is_near_the_exact_one(name, dtype):
    torch.manual_seed(0)
    kind, make, inputs = LAYERS[name]
    layer = make().to(dtype)
    scales = torch.logspace(-3, 3, 24).view(-1, *[1] * (layer.weight.ndim - 1))  # of the output channels
    layer.weight *= scales
    if layer.bias is not None:
        layer.bias *= scales.flatten()
    scales = scales[..., 0] if layer.weight.ndim == 4 else scales.flatten()
    eight = kind.from_layer(layer)
    assert type(eight) is kind
    x = inputs()
    x[0] *= 1e4
    x[1] += 3  # off centre: the zero point
    x = x.to(dtype)
    made, expected = eight(x), layer(x)
    assert (made.dtype, made.shape) == (dtype, expected.shape)
    for sample, exact in zip(made.float(), expected.float(), strict=True):
        assert ((sample - exact) / scales).norm() <= 0.01 * (exact / scales).norm()
    alone = torch.cat([eight(sample) for sample in x.split(1)])
    assert torch.equal(alone, made)  # no sample depends on the others


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_input_is_off_by_more_than_half_a_step(dtype):
    for factor in 1.0, 0.37, 1e6:
        for low in torch.arange(0, 255.5, 0.5).tolist():  # a half rounds to an even zero point, up or down
            x = (factor * torch.tensor([[-low, 255 - low, 0.0, 1.0]])).to(dtype)
            quantized, scale, zero_point = quantize_sample(x)
            error = (quantized.double() - zero_point) * scale - x.double()
            assert error.abs().max() <= 0.51 * scale


@needs_kernels
@torch.no_grad()
def test_weights_with_strides():
    """As a pickle stores those that were transposed."""
    for make, x in (lambda: Linear(48, 24), tokens()), (lambda: Conv2d(48, 24, 3), feature_map()):
        layer = make()
        expected = int8_of(layer)(x)
        layer.weight = torch.nn.Parameter(layer.weight.transpose(0, 1).contiguous().transpose(0, 1))
        assert not layer.weight.is_contiguous()
        assert torch.equal(int8_of(layer)(x), expected)


def int8_of(layer):
    return (Int8Linear if isinstance(layer, Linear) else Int8Conv2d).from_layer(layer)


@needs_kernels
@torch.no_grad()
def test_inputs_of_zeros_infinities_and_nan():
    layer = Linear(32, 16)
    eight = Int8Linear.from_layer(layer)
    assert torch.equal(eight(torch.zeros(1, 2, 32)), layer.bias.expand(1, 2, 16))
    for value in float("inf"), float("nan"):
        x = torch.ones(2, 4, 32)
        x[0, 0, 0] = value
        made = eight(x)
        assert made[0].isnan().all()
        assert made[1].isfinite().all()
    assert torch.equal(eight(torch.full((1, 2, 32), 1e-42)), layer.bias.expand(1, 2, 16))


@needs_kernels
def test_weights_that_are_moved_or_changed_are_quantized_again():
    eight, other = (Int8Conv2d.from_layer(Conv2d(16, 16, 3)) for _ in range(2))
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        assert not torch.equal(eight(x), other(x))
        eight.load_state_dict(other.state_dict())
        assert torch.equal(eight(x), other(x))
        for layer in (eight, other):
            layer.weight.mul_(3)
        assert torch.equal(eight(x), Int8Conv2d.from_layer(eight.to_layer())(x))
        half = copy.deepcopy(eight).to(torch.bfloat16)
        assert torch.equal(half(x.bfloat16()), Int8Conv2d.from_layer(half.to_layer())(x.bfloat16()))
        assert eight.to("meta").quantized is None


@needs_kernels
@torch.no_grad()
def test_a_new_weight_in_the_memory_of_the_last_is_quantized():
    eight, x, memory = Int8Linear.from_layer(Linear(32, 16)), torch.randn(2, 4, 32), np.ones((16, 32), np.float32)
    for value in 1, -1:
        memory[:] = value  # which autograd does not count
        eight.weight = torch.nn.Parameter(torch.from_numpy(memory))
        assert torch.equal(eight(x), Int8Linear.from_layer(eight.to_layer())(x))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert has_int8_kernels.__wrapped__()
    finally:
        torch.set_default_dtype(before)


@needs_kernels
@pytest.mark.filterwarnings("ignore")
def test_full_precision_where_the_kernels_do_not_apply():
    layer = Linear(32, 16)
    eight = Int8Linear.from_layer(layer)
    x = torch.randn(2, 4, 32)
    made = eight(x)
    assert torch.equal(made, layer(x))
    made.sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert not torch.equal(eight(x), layer(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(eight(x), layer(x))
        assert torch.equal(torch.jit.trace(eight, x)(x), layer(x))
        compiled = torch.compile(eight, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))
        assert torch.equal(eight.double()(x.double()), layer.double()(x.double()))


@needs_kernels
def test_compile_leaves_the_unet_in_int8_eager(pipe, photo):
    pipe.enable_int8()
    expected = run(pipe, photo)
    pipe.compile(backend="eager")
    assert torch.equal(run(pipe, photo), expected)


@needs_kernels
def test_the_last_of_fp8_and_int8_counts(pipe):
    pipe.enable_int8()
    pipe.enable_fp8()
    assert not int8_layers(pipe)
    pipe.enable_int8()
    assert int8_layers(pipe)
    assert not any(isinstance(layer, Fp8Linear) for layer in pipe.unet.modules())


@needs_kernels
def test_settings_of_other_kinds_apply_to_int8(pipe, photo):
    """Attention slicing is exact; FreeU and DeepCache change the image, as without int8."""
    pipe.enable_int8()
    expected = run(pipe, photo)
    pipe.enable_attention_slicing(1)
    assert torch.allclose(run(pipe, photo), expected, atol=1e-2)
    pipe.disable_attention_slicing()
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    assert not torch.allclose(run(pipe, photo), expected, atol=1e-2)
    pipe.disable_freeu()
    assert not torch.equal(run(pipe, photo, cache_interval=2), expected)
    assert torch.equal(run(pipe, photo), expected)


@needs_kernels
def test_layers_of_others_stay_and_copies_are_equal(pipe, photo, tmp_path):
    class Louder(Conv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    resnet, seen = pipe.unet.down_blocks[0].resnets[0], []
    resnet.conv1 = louder = Louder(16, 16, 3, padding=1)
    resnet.conv2.padding_mode = "circular"
    block = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    handle = block.ff.net[0].proj.register_forward_hook(lambda *_: seen.append(1))
    prune.identity(block.attn1.to_q, "weight")
    pipe.enable_int8()
    assert resnet.conv1 is louder
    assert type(resnet.conv2) is Conv2d
    assert type(block.attn1.to_q) is Linear
    assert type(block.attn1.to_k) is Int8Linear
    run(pipe, photo)
    assert seen
    handle.remove()
    watched = block.attn1.to_k.register_forward_hook(lambda *_: seen.append(2))
    run(pipe, photo)
    assert 2 in seen
    watched.remove()

    plain = tiny_pipeline()
    plain.set_progress_bar_config(disable=True)
    plain.enable_int8()
    expected = run(plain, photo)
    for twin in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert int8_layers(twin)
        assert torch.equal(run(twin, photo), expected)
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert not int8_layers(loaded)
    loaded.enable_int8()
    assert torch.equal(run(loaded, photo), expected)


@pytest.mark.parametrize("module", [fp8, int8])
def test_a_unet_without_parameters_is_named(module):
    name = f"enable_{module.__name__.rpartition('.')[2]}"
    for unet in (lambda *_: None), torch.nn.Identity():
        with pytest.raises(InputError, match=f"{name}: expected a UNet that is a torch module with parameters, got "):
            module.enable(unet)


@pytest.mark.parametrize("module", [fp8, int8])
def test_a_unet_none_of_whose_layers_is_quantized_is_warned_about(pipe, module):
    if module is int8 and not has_int8_kernels():
        pytest.skip("needs VNNI or AMX instructions")
    for layer in pipe.unet.modules():
        layer.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=f"enable_{module.__name__.rpartition('.')[2]}: no layer is quantized"):
        module.enable(pipe.unet)


@needs_kernels
@torch.no_grad()
def test_full_precision_where_other_code_or_a_setting_asks_for_it(monkeypatch):
    layer = Linear(32, 16)
    eight, x = Int8Linear.from_layer(layer), torch.randn(2, 4, 32)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(eight(x), layer(x))
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, input: 2 * input)
    assert torch.equal(eight(x), 2 * x)


def test_what_cannot_run_int8_is_named(pipe, monkeypatch):
    if not has_int8_kernels():
        with pytest.raises(InputError, match=r"enable_int8: expected a processor with VNNI or AMX .*, got "):
            pipe.enable_int8()
    monkeypatch.setattr(int8, "has_int8_kernels", lambda: False)
    with pytest.raises(InputError, match=r"enable_int8: expected a processor with VNNI or AMX .*, got "):
        pipe.enable_int8()
    pipe.unet.to(torch.float16)
    with pytest.raises(InputError, match=r"enable_int8: expected a UNet in float32 or bfloat16, got torch\.float16"):
        pipe.enable_int8()
    pipe.unet.to("meta")
    with pytest.raises(InputError, match=r"enable_int8: expected a UNet on a CPU, got one on meta"):
        pipe.enable_int8()
    assert not int8_layers(pipe)
