"""Changes that a fork makes to loaded models without editing the package."""

import pytest
import torch
import torch.nn.functional as F
from fork import (
    Euler,
    GatedUNet,
    MyUNet,
    Tempered,
    WindowAttention,
    custom_scheduler,
    gated_blocks,
    main,
    quieter_skips,
    tempered_attention,
    wider_input,
    windowed_attention,
)
from torch.nn.attention import SDPBackend

import imvar
from imvar.models import CrossAttention, FreeU, ResnetBlock, SelfAttention
from imvar.models.attention import SDPAKernel, attention_layers
from imvar.models.unet_blocks import concat_skip


def run(pipe, photo, **options):
    return pipe(
        photo, num_inference_steps=3, output_type="pt", generator=torch.Generator().manual_seed(0), **options
    ).images


def predict(unet, tokens=1):
    torch.manual_seed(0)
    x = torch.randn(2, unet.config.in_channels, 8, 8)
    return unet(x, 7, torch.randn(2, tokens, 24)).sample


def test_the_worked_example(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fork.py", str(checkpoint)])
    main()
    assert "saved and loaded again: equal" in capsys.readouterr().out


@pytest.mark.parametrize("change", [tempered_attention, windowed_attention, quieter_skips, custom_scheduler])
def test_a_change_affects_the_images(pipe, photo, change):
    before = run(pipe, photo)
    change(pipe)
    after = run(pipe, photo)
    assert after.isfinite().all()
    assert not torch.equal(before, after)


@torch.no_grad()
def test_gates_of_one_are_neutral_and_gates_of_zero_are_not(pipe):
    before = predict(pipe.unet)
    gated_blocks(pipe)
    assert torch.equal(predict(pipe.unet), before)
    pipe.unet.mid_block.resnets[0].gate.zero_()
    assert not torch.equal(predict(pipe.unet), before)


def test_added_parameters_are_trained_saved_and_loaded(pipe, tmp_path):
    gated_blocks(pipe)
    tempered_attention(pipe)
    predict(pipe.unet, tokens=2).square().mean().backward()
    gate, temperature = pipe.unet.mid_block.resnets[0].gate, attention_layers(pipe.unet)[0].attend.temperature
    assert gate.grad.abs().max() > 0
    assert temperature.grad.abs() > 0
    torch.optim.SGD(pipe.unet.parameters(), lr=1e-2).step()
    pipe.unet.save_pretrained(tmp_path)
    loaded = MyUNet.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(predict(loaded, tokens=2), predict(pipe.unet, tokens=2))
    with pytest.raises(imvar.CheckpointError, match=r"gate"):
        imvar.UNet2DConditionModel.from_pretrained(tmp_path)
    with pytest.raises(imvar.CheckpointError, match=r"temperature"):
        GatedUNet.from_pretrained(tmp_path)


def test_the_added_parameters_lie_where_their_layers_lie(pipe, tmp_path):
    gated_blocks(pipe)
    tempered_attention(pipe)
    theirs = pipe.unet.keymap.to_file(pipe.unet.state_dict())
    assert "down_blocks.0.resnets.0.gate" in theirs
    assert "up_blocks.1.attentions.0.transformer_blocks.0.attn2.attend.temperature" in theirs
    assert len(theirs) == len(pipe.unet.state_dict())


@torch.no_grad()
def test_wider_input(pipe, tmp_path):
    torch.manual_seed(0)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 1, 24)
    before = pipe.unet(x, 7, context).sample
    wider_input(pipe)
    after = pipe.unet(torch.cat([x, torch.randn(1, 5, 8, 8)], dim=1), 7, context).sample
    assert torch.allclose(after, before, atol=1e-6)
    pipe.unet.save_pretrained(tmp_path)
    assert imvar.UNet2DConditionModel.from_pretrained(tmp_path).config.in_channels == 9


@torch.no_grad()
def test_replace_layers_replaces_every_layer_of_a_class(pipe):
    layers = [m for m in pipe.unet.modules() if isinstance(m, SelfAttention)]
    assert imvar.replace_layers(pipe.unet, SelfAttention, WindowAttention.from_layer) == len(layers)
    assert all(isinstance(m, WindowAttention) for m in pipe.unet.modules() if isinstance(m, SelfAttention))
    before = predict(pipe.unet)
    assert imvar.replace_layers(pipe.unet, ResnetBlock, lambda block: block) > 0
    assert torch.equal(predict(pipe.unet), before)
    assert imvar.replace_layers(pipe.unet, torch.nn.LSTM, lambda layer: layer) == 0


class QKNormAttention(SelfAttention):
    """Normalized queries and keys (arXiv:2010.04245)."""

    def __init__(self, *args, **sizes):
        super().__init__(*args, **sizes)
        self.norm_q, self.norm_k = (torch.nn.RMSNorm(self.dim // self.heads, eps=1e-6) for _ in range(2))

    def project_qkv(self, hidden_states, context):
        q, k, v = super().project_qkv(hidden_states, context)
        return self.norm_q(q), self.norm_k(k), v


class Decoupled(CrossAttention):
    def __init__(self, *args, tokens=1, **sizes):
        super().__init__(*args, **sizes)
        self.tokens = tokens


def test_an_undo_puts_kernels_with_weights_and_those_of_classes_back(pipe):
    layers = attention_layers(pipe.unet)
    imvar.set_attend(pipe.unet, kernel := Tempered(2.0), kind=CrossAttention)
    layers[0].__class__ = Halved
    del layers[0].attend
    replacements = imvar.set_attend(pipe.unet, HeadScales()), imvar.set_attend(pipe.unet, imvar.sdpa, CrossAttention)
    assert replacements == (8, 4)
    for replacement in reversed(replacements):
        replacement.undo()
    assert layers[0].attend is Halved.attend
    assert all((layer.attend is kernel) == isinstance(layer, CrossAttention) for layer in layers)
    assert not any("scales" in name for name in pipe.unet.state_dict())


def test_a_layer_is_found_by_each_of_its_names():
    block = torch.nn.Sequential(torch.nn.SiLU())
    model = torch.nn.ModuleDict({"a": block, "b": block, "c": torch.nn.Sequential(torch.nn.SiLU())})
    assert imvar.replace_layers(model, torch.nn.SiLU, lambda layer: torch.nn.ReLU(), where="b.*") == 1
    assert isinstance(block[0], torch.nn.ReLU)
    assert isinstance(model["c"][0], torch.nn.SiLU)


@torch.no_grad()
def test_a_subclass_takes_the_weights_of_a_layer(pipe):
    pipe.to(torch.bfloat16)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.train()
    layer.attend, layer.slice_size, x = Tempered(2.0), 1, torch.randn(2, 4, 32, dtype=torch.bfloat16)
    new = QKNormAttention.from_layer(layer)
    assert new.attend is layer.attend
    assert new.training
    assert new.slice_size == 1
    assert new.to_q.weight is layer.to_q.weight
    assert {p.dtype for p in (*new.norm_q.parameters(), *new.norm_k.parameters())} == {torch.bfloat16}
    assert torch.equal(SelfAttention.from_layer(new)(x), layer(x))
    halved = Halved.from_layer(layer)
    assert "attend" not in halved._modules
    assert torch.equal(SelfAttention.from_layer(halved)(x), halved(x))
    cross = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    assert Decoupled.from_layer(cross, tokens=3).tokens == 3
    pixels = pipe.vae.decoder.mid_block.attentions[0]
    image = torch.randn(1, 16, 4, 4, dtype=torch.bfloat16)
    assert torch.equal(type("Mine", (type(pixels),), {}).from_layer(pixels)(image), pixels(image))
    with pytest.raises(imvar.InputTypeError, match="layer: expected an attention layer"):
        QKNormAttention.from_layer(pipe.unet.conv_in)


class Dropped(torch.nn.Module):
    """A layer around another, with dropout and weights of its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.dropout, self.gate = layer, torch.nn.Dropout(0.5), torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.gate.weight)

    def forward(self, x):
        return self.dropout(self.layer(x) * self.gate.weight)


@torch.no_grad()
def test_a_new_layer_takes_over_mode_dtype_and_device(pipe, photo):
    pipe.to(torch.bfloat16)
    x, context = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16), torch.randn(2, 1, 24, dtype=torch.bfloat16)
    before = pipe.unet(x, 7, context).sample
    imvar.replace_layers(pipe.unet, SelfAttention, Dropped)
    assert torch.equal(pipe.unet(x, 7, context).sample, before)
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}
    assert torch.equal(run(pipe, photo), run(pipe, photo))

    pipe.unet.train()
    layer = pipe.unet.mid_block.attentions[0].eval()
    imvar.replace_layers(pipe.unet, ResnetBlock, lambda block: torch.nn.Sequential(block, torch.nn.Dropout()))
    assert pipe.unet.mid_block.resnets[0][1].training
    imvar.replace_layers(pipe.unet, type(layer), torch.nn.Sequential)
    assert not any(module.training for module in layer.modules())
    empty = imvar.UNet2DConditionModel.from_config(pipe.unet.config).to("meta")
    imvar.replace_layers(empty, torch.nn.SiLU, lambda layer: torch.nn.PReLU())
    imvar.replace_layers(pipe.unet, torch.nn.SiLU, lambda layer: torch.nn.PReLU())  # has no weights to follow
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}


def test_a_shared_layer_stays_shared(pipe):
    kernel, count = HeadScales(), len(attention_layers(pipe.unet))
    imvar.set_attend(pipe.unet, kernel)
    assert imvar.replace_layers(pipe.unet, HeadScales, lambda layer: Tempered()) == count
    assert len({id(layer.attend) for layer in attention_layers(pipe.unet)}) == 1
    pair = torch.nn.ModuleDict({"a": kernel, "b": kernel})
    assert imvar.replace_layers(pair, HeadScales, lambda layer: Tempered()) == 2
    assert pair["a"] is pair["b"]


def test_a_replacement_that_fails_replaces_nothing(pipe):
    before, made = list(pipe.unet.modules()), iter([Tempered()])
    with pytest.raises(imvar.InputTypeError, match="make: expected a function that returns a module, got None"):
        imvar.replace_layers(pipe.unet, SelfAttention, lambda layer: next(made, None))
    assert all(a is b for a, b in zip(pipe.unet.modules(), before, strict=True))


@torch.no_grad()
def test_kernels_are_set_and_reset(pipe):
    before, calls = predict(pipe.unet, tokens=2), []

    def counting(q, k, v):
        calls.append(q.shape)
        return F.scaled_dot_product_attention(q, k, v)

    imvar.set_attend(pipe.unet, counting)
    assert torch.equal(predict(pipe.unet, tokens=2), before)
    assert len(calls) == len(attention_layers(pipe.unet))
    imvar.set_attend(pipe.unet, Tempered(2.0))
    assert not torch.equal(predict(pipe.unet, tokens=2), before)
    imvar.set_attend(pipe.unet, imvar.sdpa)
    assert torch.equal(predict(pipe.unet, tokens=2), before)
    merge = pipe.unet.merge
    pipe.unet.merge = torch.nn.Identity()
    pipe.unet.merge = lambda h, skip, level: merge(h, skip, level)
    pipe.unet.disable_freeu()
    assert torch.equal(predict(pipe.unet, tokens=2), before)


@pytest.mark.parametrize(
    ("kernel", "got"),
    [
        (lambda q, k, v: v.mean(2, keepdim=True), r"a tensor of shape \(2, \d, 1, \d\)"),
        (lambda q, k, v: None, "NoneType"),
        (lambda q, k, v: q.flatten(1, 2), "a tensor"),
    ],
)
def test_invalid_kernel_outputs_are_named(pipe, kernel, got):
    imvar.set_attend(pipe.unet, kernel)
    with pytest.raises(
        imvar.InputTypeError, match=f"attend: expected a kernel that returns a tensor of q's shape .*, got {got}"
    ):
        predict(pipe.unet, tokens=2)


@pytest.mark.parametrize(
    "seam",
    [
        (lambda unet: unet, "merge"),
        (lambda unet: attention_layers(unet)[0], "attend"),
        (lambda unet: attention_layers(unet)[0], "backend"),
    ],
)
def test_only_functions_are_accepted_as_kernels_and_merges(pipe, seam):
    layer = seam[0](pipe.unet)
    for invalid in (3, "sdpa", *([None] if seam[1] != "backend" else [])):
        with pytest.raises(imvar.InputTypeError, match=f"{seam[1]}: expected a function, got"):
            setattr(layer, seam[1], invalid)


class Quiet(imvar.UNet2DConditionModel):
    """Overrides merge as a method."""

    def merge(self, h, skip, level):
        return torch.cat([h, 0.5 * skip], dim=1)


class Halved(SelfAttention):
    attend = staticmethod(lambda q, k, v: 0.5 * imvar.sdpa(q, k, v))


@torch.no_grad()
def test_a_subclass_may_have_its_own_merge_and_kernel(pipe, photo):
    own = Quiet.from_config(pipe.unet.config)
    own.load_state_dict(pipe.unet.state_dict())
    plain = predict(pipe.unet)
    pipe.unet.merge = lambda h, skip, level: torch.cat([h, 0.5 * skip], dim=1)
    expected, images = predict(pipe.unet), run(pipe, photo)
    assert torch.equal(predict(own), expected)
    pipe.unet = own.eval()
    assert torch.allclose(run(pipe, photo), images, atol=1e-5)
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    assert not torch.equal(predict(own), expected)
    pipe.disable_freeu()
    assert torch.equal(predict(own), expected)
    assert not torch.equal(plain, expected)
    layer, x = Halved(16, 2), torch.randn(1, 4, 16)
    usual = SelfAttention(16, 2)
    usual.load_state_dict(layer.state_dict())
    assert not torch.allclose(layer(x), usual(x))
    imvar.set_attend(usual, Halved.attend)
    assert torch.equal(layer(x), usual(x))


@torch.no_grad()
def test_freeu_keeps_the_merge_that_was_set(pipe):
    plain = predict(pipe.unet)
    pipe.unet.merge = lambda h, skip, level: torch.cat([h, 0.5 * skip], dim=1)
    halved = predict(pipe.unet)
    pipe.disable_freeu()
    assert torch.equal(predict(pipe.unet), halved)
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    pipe.enable_freeu(1, 1, 1, 1)
    assert torch.allclose(predict(pipe.unet), halved, atol=1e-5)
    pipe.disable_freeu()
    assert torch.equal(predict(pipe.unet), halved)
    assert not torch.equal(plain, halved)
    pipe.unet.merge = FreeU(0.9, 0.2, 1.2, 1.4)
    as_merge = predict(pipe.unet)
    del pipe.unet.merge
    pipe.unet.merge = concat_skip
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    assert torch.equal(predict(pipe.unet), as_merge)


@torch.no_grad()
def test_a_module_replaces_a_kernel_or_merge_of_a_class(pipe):
    layer, x = Halved(16, 4), torch.randn(1, 4, 16)
    before, layer.attend = layer(x), HeadScales()
    assert not torch.equal(layer(x), before)
    assert "attend.scales" in layer.state_dict()
    layer.attend = imvar.sdpa
    assert not torch.equal(layer(x), before)
    assert "attend.scales" not in layer.state_dict()


@torch.no_grad()
def test_a_custom_kernel_also_runs_for_one_token(pipe):
    """It need not be a softmax, for any number of keys."""
    before = predict(pipe.unet)
    imvar.set_attend(pipe.unet, lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
    assert torch.allclose(predict(pipe.unet), before, atol=1e-6)
    imvar.set_attend(pipe.unet, lambda q, k, v: 0.5 * F.scaled_dot_product_attention(q, k, v))
    halved = predict(pipe.unet)
    imvar.replace_layers(pipe.unet, CrossAttention, lambda layer: setattr(layer, "attend", imvar.sdpa) or layer)
    assert not torch.equal(predict(pipe.unet), halved)


@torch.no_grad()
@pytest.mark.parametrize("size", ["auto", "max", 1, 3, 4, None])
def test_sliced_attention_equals_unsliced(pipe, size):
    before = predict(pipe.unet, tokens=5)
    pipe.enable_attention_slicing(size)
    assert torch.allclose(predict(pipe.unet, tokens=5), before, atol=1e-6)
    pipe.disable_attention_slicing()
    assert torch.equal(predict(pipe.unet, tokens=5), before)


@torch.no_grad()
def test_slices_have_the_requested_size(pipe):
    sizes = []

    def recording(q, k, v):
        sizes.append(q.shape[:2])
        return F.scaled_dot_product_attention(q, k, v)

    recording.sliceable = True
    before = predict(pipe.unet, tokens=2)
    imvar.set_attend(pipe.unet, recording)
    for size, expected in (("auto", {(1, 2)}), ("max", {(1, 1)}), (3, {(1, 3), (1, 1)})):
        sizes.clear()
        pipe.unet.set_attention_slice(size)
        assert torch.allclose(predict(pipe.unet, tokens=2), before, atol=1e-6)
        assert set(sizes) == expected  # samples, heads
    layers = len(attention_layers(pipe.unet))
    pipe.unet.set_attention_slice([1] * (layers - 1) + [4])
    for bad in (0, -1, 5, 2.5, "most", True, [1], [9] * layers):
        with pytest.raises(imvar.InputError, match="slice_size"):
            pipe.unet.set_attention_slice(bad)


def first_frame(q, k, v):
    return F.scaled_dot_product_attention(q, k[:1].expand_as(k), v[:1].expand_as(v))


class HeadScales(torch.nn.Module):
    """A kernel with a parameter per head."""

    def __init__(self):
        super().__init__()
        self.scales = torch.nn.Parameter(torch.linspace(0.5, 2, 4).view(4, 1, 1))

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q * self.scales, k, v)


@torch.no_grad()
@pytest.mark.parametrize("kernel", [first_frame, HeadScales()])
def test_a_custom_kernel_is_not_sliced_without_its_consent(pipe, kernel):
    plain = predict(pipe.unet)
    imvar.replace_layers(pipe.unet, SelfAttention, lambda layer: setattr(layer, "attend", kernel) or layer)
    before = predict(pipe.unet)
    assert not torch.allclose(before, plain, atol=1e-3)
    with pytest.warns(UserWarning, match="slice_size: 4 of 8 attention layers keep a custom kernel unsliced"):
        pipe.enable_attention_slicing("max")
    assert torch.equal(predict(pipe.unet), before)


@torch.no_grad()
def test_the_xformers_switch_keeps_custom_kernels(pipe):
    imvar.replace_layers(pipe.unet, SelfAttention, lambda layer: setattr(layer, "attend", HeadScales()) or layer)
    before, calls = predict(pipe.unet, tokens=2), []

    def op(q, k, v):
        calls.append(q.shape)
        return F.scaled_dot_product_attention(q, k, v)

    with pytest.warns(UserWarning, match="attention_op: 4 of 8 attention layers keep their custom kernel"):
        pipe.enable_xformers_memory_efficient_attention(op)
    assert torch.equal(predict(pipe.unet, tokens=2), before)
    assert len(calls) == 4
    imvar.set_attend(pipe.unet, HeadScales())  # set after the switch
    after = predict(pipe.unet, tokens=2)
    pipe.disable_xformers_memory_efficient_attention()
    assert torch.equal(predict(pipe.unet, tokens=2), after)
    assert not torch.equal(after, before)


@torch.no_grad()
def test_one_token_equals_the_same_token_twice(pipe):
    torch.manual_seed(0)
    layer = CrossAttention(32, 24, 4)
    x, token = torch.randn(2, 9, 32), torch.randn(2, 1, 24)
    once, twice = layer(x, token), layer(x, token.repeat(1, 2, 1))
    assert torch.allclose(once.expand_as(twice), twice, atol=1e-6)
    latents = torch.randn(2, 4, 8, 8)
    once, twice = (pipe.unet(latents, 7, token.repeat(1, n, 1)).sample for n in (1, 2))
    assert torch.allclose(once, twice, atol=1e-5)


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without CUDA")
def test_memory_efficient_attention_takes_precedence_over_slicing(pipe, photo):
    before, calls = predict(pipe.unet, tokens=2), []

    def op(q, k, v):
        calls.append(tuple(q.shape[:2]))
        return F.scaled_dot_product_attention(q, k, v)

    pipe.enable_attention_slicing("max")
    for model in (pipe, pipe.unet, pipe.vae):
        with pytest.warns(UserWarning, match="CUDA is not available") as warned:
            model.enable_xformers_memory_efficient_attention()
        assert len(warned) == 1
    assert torch.equal(predict(pipe.unet, tokens=2), before)
    pipe.enable_xformers_memory_efficient_attention(attention_op=op)
    assert torch.equal(predict(pipe.unet, tokens=2), before)
    assert set(calls) == {(2, 4)}  # not sliced
    run(pipe, photo)
    pipe.disable_xformers_memory_efficient_attention()
    calls.clear()
    predict(pipe.unet, tokens=2)
    assert not calls
    assert all(layer.slice_size == 1 for layer in attention_layers(pipe.unet))
    with pytest.warns(UserWarning, match="CUDA is not available"):
        pipe.unet.enable_xformers_memory_efficient_attention(SDPBackend.FLASH_ATTENTION)
    assert attention_layers(pipe.unet)[0].backend == SDPAKernel(SDPBackend.FLASH_ATTENTION)
    for bad in (SDPBackend.OVERRIDEABLE, "flash"):
        with pytest.raises(imvar.InputError, match="attention_op"):
            pipe.unet.enable_xformers_memory_efficient_attention(bad)


def test_settings_belong_to_the_model(pipe):
    other = imvar.StableDiffusionImageVariationPipeline(**pipe.components)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert other.unet.merge is pipe.unet.merge
    with pytest.raises(imvar.InputError, match="s2: expected a number above 0, got 0"):
        pipe.enable_freeu(s1=0.9, s2=0, b1=1.2, b2=1.4)


def test_a_component_that_cannot_be_saved_is_named_before_anything_is_written(pipe, tmp_path):
    pipe.scheduler = Euler()
    with pytest.raises(imvar.InputTypeError, match="scheduler: expected a component with save_pretrained, got Euler"):
        pipe.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_scheduler_of_five_names_is_copied_for_each_call(pipe, photo):
    pipe.scheduler = Euler()
    run(pipe, photo)
    assert not hasattr(pipe.scheduler, "sigmas")


def test_a_buffer_that_is_in_no_file_is_named(checkpoint):
    class Mine(imvar.UNet2DConditionModel):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    with pytest.raises(imvar.CheckpointError, match=r"table.*persistent"):
        Mine.from_pretrained(checkpoint, subfolder="unet")


def test_a_subclass_may_add_a_config_field(tmp_path):
    from dataclasses import dataclass

    from imvar.models.unet import UNetConfig

    @dataclass(frozen=True, eq=False)
    class MyConfig(UNetConfig):
        extra: int = 3

    class Mine(imvar.UNet2DConditionModel):
        config_class = MyConfig

    from tests.support.random_checkpoint import TINY_UNET

    Mine(**TINY_UNET, extra=5).save_pretrained(tmp_path)
    assert Mine.from_pretrained(tmp_path).config.extra == 5
    with pytest.raises(TypeError, match="'extra'"):
        imvar.UNet2DConditionModel(extra=5)


def mean_of_values(q, k, v):
    return v.mean(dim=2, keepdim=True).expand_as(q)


@torch.no_grad()
def test_kernels_by_kind_and_place_are_undone(pipe):
    before = predict(pipe.unet, tokens=2)
    layers = {name: layer for name, layer in pipe.unet.named_modules() if isinstance(layer, SelfAttention)}
    replacement = imvar.set_attend(pipe.unet, mean_of_values, kind=SelfAttention, where="up_blocks.*")
    changed = {name for name, layer in layers.items() if layer.attend is mean_of_values}
    assert changed == {name for name in layers if name.startswith("up_blocks.")}
    assert replacement == len(changed) > 0
    assert not torch.equal(predict(pipe.unet, tokens=2), before)
    replacement.undo()
    assert torch.equal(predict(pipe.unet, tokens=2), before)
    assert all(layer.attend is imvar.sdpa for layer in layers.values())
    with pytest.raises(imvar.InputError, match=r"model: expected .* at 'nowhere'"):
        imvar.set_attend(pipe.unet, mean_of_values, where="nowhere")


@torch.no_grad()
def test_layers_by_place_are_undone(pipe):
    before, layers = predict(pipe.unet), list(pipe.unet.modules())
    replacement = imvar.replace_layers(
        pipe.unet, ResnetBlock, lambda block: torch.nn.Sequential(block), where="mid_block.*"
    )
    assert replacement == 2
    replacement.undo()
    assert list(pipe.unet.modules()) == layers
    assert torch.equal(predict(pipe.unet), before)


def test_a_kernel_that_a_class_defines_returns(pipe):
    class Mean(SelfAttention):
        def attend(self, q, k, v):
            return mean_of_values(q, k, v)

    imvar.replace_layers(pipe.unet, SelfAttention, Mean.from_layer, where="mid_block.*")
    layer = next(layer for layer in pipe.unet.modules() if isinstance(layer, Mean))
    own, replacement = layer.attend, imvar.set_attend(pipe.unet, imvar.sdpa, kind=Mean)
    assert layer.attend is imvar.sdpa
    replacement.undo()
    assert layer.attend == own
