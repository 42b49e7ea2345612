"""Models under torch.jit.trace, torch.export, the ONNX exporters and torch.func, as diffusers' models allow."""

import io

import pytest
import torch
from torch.export import Dim, export
from torch.func import functional_call, vmap

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")


def unet_inputs(batch=2, height=8, width=8, tokens=1, timestep=5):
    return torch.randn(batch, 4, height, width), torch.tensor(timestep), torch.randn(batch, tokens, 24)


INPUTS = {
    "unet": unet_inputs,
    "vae": lambda batch=1, height=32, width=32: (torch.randn(batch, 3, height, width),),
    "image_encoder": lambda batch=1: (torch.randn(batch, 3, 32, 32),),
}
OTHER_INPUTS = [
    ("unet", {"batch": 4, "timestep": 900}),
    ("unet", {"batch": 1, "height": 16, "width": 12}),
    ("unet", {"tokens": 3}),
    ("vae", {"batch": 2, "height": 48}),
    ("image_encoder", {"batch": 3}),
]


def assert_same(out, expected):
    assert list(out) == list(expected)
    for name, value in expected.items():
        assert torch.allclose(out[name], value, atol=2e-5), name


@torch.no_grad()
@pytest.mark.parametrize(("part", "changes"), OTHER_INPUTS)
def test_a_traced_model_is_right_for_other_inputs_too(pipe, part, changes):
    model = getattr(pipe, part)
    traced = torch.jit.trace(model, INPUTS[part](), strict=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    other = INPUTS[part](**changes)
    for run in (traced, torch.jit.load(file)):
        assert_same(run(*other), model(*other))


@torch.no_grad()
def test_the_unet_is_traced_by_keyword_and_as_a_tuple(pipe):
    x, t, context = unet_inputs()
    named = {"sample": x, "timestep": t, "encoder_hidden_states": context}
    assert_same(torch.jit.trace(pipe.unet, example_kwarg_inputs=named, strict=False)(**named), pipe.unet(**named))


@torch.no_grad()
@pytest.mark.parametrize("part", INPUTS)
def test_an_exported_model_gives_the_same_output(pipe, part):
    model, inputs = getattr(pipe, part), INPUTS[part]()
    program, file = export(model, inputs), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for run in (program.module(), torch.export.load(file).module()):
        out = run(*inputs)
        assert type(out) is type(model(*inputs))
        assert_same(out, model(*inputs))


@torch.no_grad()
def test_the_unet_is_exported_for_any_batch(pipe):
    batch = {0: Dim("batch", min=2, max=63)}
    shapes = {"sample": batch, "timestep": None, "encoder_hidden_states": batch}
    run, other = export(pipe.unet, unet_inputs(), dynamic_shapes=shapes).module(), unet_inputs(batch=6)
    assert_same(run(*other), pipe.unet(*other))


@torch.no_grad()
@pytest.mark.parametrize("grad", [False, True])
def test_models_run_under_vmap(pipe, grad):
    with torch.set_grad_enabled(grad):
        x, t, context = (torch.stack([tensor] * 3) for tensor in unet_inputs())
        x = x + torch.randn(3, 1, 1, 1, 1)
        out = vmap(pipe.unet, in_dims=(0, None, 0), randomness="error")(x, t[0], context)
        assert_same(out, {"sample": torch.stack([pipe.unet(x[i], t[i], context[i]).sample for i in range(3)])})
        images = torch.randn(3, 1, 3, 32, 32)
        expected = {"sample": torch.stack([pipe.vae(image).sample for image in images])}
        assert_same(vmap(pipe.vae)(images), expected)


@pytest.mark.parametrize("part", INPUTS)
def test_models_are_called_with_other_weights_by_functional_call(pipe, part):
    model, inputs = getattr(pipe, part), INPUTS[part]()
    weights = {name: weight.detach() * 1.01 for name, weight in model.named_parameters()}
    out = functional_call(model, weights, inputs)
    assert not torch.equal(out[0], model(*inputs)[0])
    model.load_state_dict(weights)
    assert_same(out, model(*inputs))
