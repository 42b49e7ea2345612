"""Modules carry the published names in the published order, and can be called and hooked as diffusers' can."""

import inspect
import warnings

import diffusers
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker as RefSafetyChecker

import imvar
from tests.support.published_checkpoint import PUBLISHED
from tests.support.random_checkpoint import tiny_pipeline

MODELS = {
    "unet": imvar.UNet2DConditionModel,
    "vae": imvar.AutoencoderKL,
    "image_encoder": imvar.CLIPVisionModelWithProjection,
    "safety_checker": imvar.StableDiffusionSafetyChecker,
}
ATOL = 1e-5


def reference(part, config):
    """The reference's model with the fields of an imvar config."""
    fields = {name: value for name, value in config.to_dict().items() if value is not None}
    if part == "unet":
        return diffusers.UNet2DConditionModel(**fields)
    if part == "vae":
        return diffusers.AutoencoderKL(**fields)
    if part == "image_encoder":
        return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**fields))
    return RefSafetyChecker(transformers.CLIPConfig(**fields))


@pytest.fixture
def pairs():
    """Imvar's tiny model and the reference's, with the same weights, by part."""
    pipe = tiny_pipeline()
    models = {}
    for part in MODELS:
        ours = getattr(pipe, part)
        theirs = reference(part, ours.config)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        models[part] = ours.eval(), theirs.eval()
    return models


def published_keys(part):
    """The list in tests/published/keys, in the form that transformers 5 has."""
    lines = (PUBLISHED / "keys" / f"{part}.txt").read_text(encoding="utf-8").splitlines()
    keys = {line.split("\t")[0] for line in lines if line}
    keys = {key for key in keys if "position_ids" not in key}
    return {key.replace("vision_model.vision_model.", "vision_model.") for key in keys}


@pytest.mark.parametrize("part", MODELS)
def test_keys_and_their_order_at_full_size(part):
    with torch.device("meta"):
        ours = MODELS[part](MODELS[part].read_config(PUBLISHED / "v2.0" / part / "config.json"))
        theirs = reference(part, ours.config)
    assert ours.state_dict().keys() == published_keys(part)
    assert [(n, p.shape) for n, p in ours.state_dict().items()] == [
        (n, p.shape) for n, p in theirs.state_dict().items()
    ]
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert dict(ours.named_modules()).keys() == dict(theirs.named_modules()).keys()


def test_attn2_is_found_by_name():
    with torch.device("meta"):
        unet = imvar.UNet2DConditionModel(MODELS["unet"].read_config(PUBLISHED / "v2.0" / "unet" / "config.json"))
    assert sum("attn2" in name for name, _ in unet.named_parameters()) == 80


@pytest.mark.parametrize("part", MODELS)
def test_state_dicts_go_both_ways(pairs, part):
    ours, theirs = pairs[part]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_peft_adapts_as_many_layers_as_in_diffusers(pairs):
    peft = pytest.importorskip("peft")
    names = []
    for unet in pairs["unet"]:
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
        torch.manual_seed(0)
        peft.inject_adapter_in_model(config, unet)
        names.append([name for name, _ in unet.named_parameters() if "lora_" in name])
    assert names[0] == names[1]
    assert len(names[0]) == 2 * 4 * sum(name.endswith(("attn1", "attn2")) for name, _ in unet.named_modules())
    pairs["unet"][1].load_state_dict(pairs["unet"][0].state_dict())
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 1, 24)
    with torch.no_grad():
        ours, theirs = (unet(x, 5, context).sample for unet in pairs["unet"])
    assert torch.allclose(ours, theirs, atol=ATOL)


UNET_MODULES = [
    "conv_in",
    "time_proj",
    "time_embedding",
    "down_blocks.0",
    "down_blocks.0.resnets.0",
    "down_blocks.0.resnets.0.nonlinearity",
    "down_blocks.0.downsamplers.0",
    "mid_block",
    "up_blocks.0.upsamplers.0",
    "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.0.proj_in",
    *(
        f"up_blocks.1.attentions.0.transformer_blocks.0{name}"
        for name in ("", ".norm1", ".attn1", ".attn1.to_out.0", ".norm2", ".attn2", ".ff", ".ff.net.0", ".ff.net.2")
    ),
    *(f"up_blocks.1.attentions.0.transformer_blocks.0.attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    "conv_norm_out",
    "conv_act",
    "conv_out",
]
VAE_MODULES = [
    "encoder",
    "encoder.down_blocks.0",
    "encoder.mid_block",
    "decoder",
    "decoder.mid_block",
    "decoder.mid_block.attentions.0",
    "decoder.up_blocks.0",
    "decoder.up_blocks.0.resnets.0",
    "quant_conv",
]
CLIP_MODULES = [
    "vision_model",
    "vision_model.embeddings",
    "vision_model.embeddings.position_embedding",
    "vision_model.encoder",
    "vision_model.encoder.layers.0",
    "vision_model.encoder.layers.0.self_attn",
    "vision_model.encoder.layers.0.mlp.activation_fn",
    "vision_model.post_layernorm",
    "visual_projection",
]


def flat(value):
    """All tensors in nested outputs or arguments, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "to_tuple"):
        return flat(value.to_tuple())
    return [tensor for item in value for tensor in flat(item)] if isinstance(value, (tuple, list)) else []


def recorded(model, name, call):
    """What a forward hook on a module sees in a call: inputs and outputs, once per call."""
    seen = []
    hook = lambda module, args, kwargs, out: seen.append((flat((args, *kwargs.values())), flat(out)))  # noqa: E731
    handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        call(model)
    handle.remove()
    return seen


def call_unet(unet):
    torch.manual_seed(0)
    unet(torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 1, 24))


def call_vae(vae):
    torch.manual_seed(0)
    vae(torch.randn(1, 3, 32, 32))


def call_clip(encoder):
    torch.manual_seed(0)
    size = encoder.config.image_size
    encoder(torch.randn(2, 3, size, size))


@pytest.mark.parametrize(
    ("part", "name", "call"),
    [
        *(("unet", name, call_unet) for name in UNET_MODULES),
        *(("vae", name, call_vae) for name in VAE_MODULES),
        *(("image_encoder", name, call_clip) for name in CLIP_MODULES),
    ],
)
def test_a_hook_sees_what_it_sees_in_the_reference(pairs, part, name, call):
    ours, theirs = (recorded(model, name, call) for model in pairs[part])
    assert len(ours) == len(theirs)
    assert len(ours) >= 1
    if not name.endswith(("nonlinearity", "position_embedding")):
        assert len(ours) == 1
    for (our_inputs, our_outputs), (their_inputs, their_outputs) in zip(ours, theirs, strict=True):
        for a, b in zip(our_outputs, their_outputs, strict=True):
            assert torch.allclose(a, b.reshape(a.shape), atol=ATOL)
        a, b = our_inputs[0], their_inputs[0]
        assert torch.allclose(a, b.reshape(a.shape), atol=ATOL)


@torch.no_grad()
def test_modules_are_called_as_in_the_reference(pairs):
    torch.manual_seed(0)
    sample, context, wide = torch.randn(2, 4, 8, 8), torch.randn(2, 1, 24), torch.randn(2, 3, 24)
    times = torch.tensor([1.0, 500.0])

    def outputs(unet):
        block, up = unet.down_blocks[0], unet.up_blocks[0]
        temb, x = unet.time_embedding(unet.time_proj(times)), unet.conv_in(sample)
        yield unet.time_proj(times), temb
        yield block.resnets[0](x, temb)
        yield block(x, temb, context)
        yield unet.down_blocks[1](block(x, temb, context)[0], temb)
        yield block.downsamplers[0](x)
        middle = torch.ones(2, unet.mid_block.resnets[0].norm1.num_channels, 4, 4)
        yield unet.mid_block(middle, temb, context)
        yield up.upsamplers[0](middle), up.upsamplers[0](middle, (7, 8))
        transformer = block.attentions[0]
        yield transformer(block.resnets[0](x, temb), context)[0]
        yield transformer(block.resnets[0](x, temb), context).sample
        yield transformer(block.resnets[0](x, temb), wide, return_dict=False)[0]
        inner = transformer.transformer_blocks[0]
        tokens = torch.linspace(-1, 1, 10 * inner.norm1.normalized_shape[0]).view(2, 5, -1)
        yield inner(tokens, encoder_hidden_states=context)
        yield inner.attn1(tokens), inner.attn2(tokens, context), inner.attn2(tokens, encoder_hidden_states=wide)
        yield inner.ff(tokens)

    ours, theirs = (list(outputs(unet)) for unet in pairs["unet"])
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.allclose(s, t, atol=ATOL) for s, t in zip(flat(a), flat(b), strict=True))


@torch.no_grad()
def test_the_vision_model_is_called_as_in_the_reference(pairs):
    ours, theirs = pairs["image_encoder"]
    size = ours.config.image_size
    pixels = torch.randn(2, 3, size, size)
    for i in range(2):
        assert torch.allclose(ours.vision_model(pixels)[i], theirs.vision_model(pixels)[i], atol=ATOL)
    assert torch.allclose(ours.vision_model(pixels).pooler_output, theirs.vision_model(pixels).pooler_output, atol=ATOL)
    layer, ref_layer = ours.vision_model.encoder.layers[0], theirs.vision_model.encoder.layers[0]
    x = ours.vision_model.embeddings(pixels)
    assert torch.allclose(x, theirs.vision_model.embeddings(pixels), atol=ATOL)
    assert torch.allclose(layer(x, None), ref_layer(x, None), atol=ATOL)
    assert torch.allclose(layer.self_attn(x)[0], ref_layer.self_attn(x)[0], atol=ATOL)


def test_unsupported_arguments_are_refused_by_name(pairs):
    unet, tokens = pairs["unet"][0], torch.randn(2, 5, 64)
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    dim = block.norm1.normalized_shape[0]
    for module, name in (block, "attention_mask"), (block.attn1, "attention_mask"), (block, "cross_attention_kwargs"):
        with pytest.raises(imvar.InputError, match=f"{name}: expected None"):
            module(tokens[..., :dim], **{name: torch.ones(2, 5)})


def test_blocks_without_attention_have_none(pairs):
    for unet in pairs["unet"]:
        kinds = [*unet.config["down_block_types"], *unet.config["up_block_types"]]
        for kind, block in zip(kinds, [*unet.down_blocks, *unet.up_blocks], strict=True):
            assert hasattr(block, "attentions") == kind.startswith("CrossAttn")


def test_a_controlnet_is_made_from_the_unet(pairs):
    ours, theirs = pairs["unet"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nets = [diffusers.ControlNetModel.from_unet(unet) for unet in (ours, theirs)]
    states = [net.state_dict() for net in nets]
    assert states[0].keys() == states[1].keys()
    copied = [name for name in states[0] if name in ours.state_dict()]
    assert copied
    assert all(torch.equal(states[0][name], states[1][name]) for name in copied)


def test_gradients_of_what_a_single_token_leaves_out_are_zero(pairs):
    unet = pairs["unet"][0]
    unet(torch.randn(2, 4, 8, 8), 5, torch.randn(2, 1, 24)).sample.sum().backward()
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    for parameter in (*block.norm2.parameters(), block.attn2.to_q.weight, block.attn2.to_k.weight):
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_published_arguments_come_first():
    """The positional arguments of the modules that code calls are those of the reference, in its order."""
    pipe = tiny_pipeline()
    ours, theirs = pipe.unet, reference("unet", pipe.unet.config)
    for name in UNET_MODULES:
        a, b = (inspect.signature(model.get_submodule(name).forward).parameters for model in (ours, theirs))
        positional = [p.name for p in a.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        published = [p.name for p in b.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == published[: len(positional)], name


def test_hooks_of_every_module_see_every_module(pairs):
    """As under `register_module_forward_hook`, in inference as in training."""
    counts = []
    for unet in pairs["unet"]:
        seen = []
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda m, *_, seen=seen: seen.append(type(m).__name__)
        )
        try:
            with torch.no_grad():
                call_unet(unet)
        finally:
            handle.remove()
        counts.append({name: seen.count(name) for name in ("SiLU", "GroupNorm", "Dropout", "LayerNorm")})
    assert counts[0] == {name: counts[1][name] for name in counts[0]}


def test_backward_hooks_of_what_a_single_token_leaves_out(pairs):
    for unet in pairs["unet"]:
        seen = []
        layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q
        layer.register_full_backward_hook(lambda layer, inputs, outputs, seen=seen: seen.append(outputs[0].shape))
        call_unet(unet)
        torch.manual_seed(0)
        unet(torch.randn(2, 4, 8, 8), 5, torch.randn(2, 1, 24)).sample.sum().backward()
        assert len(seen) == 1
