"""Every network beside its original: weights saved by one side, loaded by the other."""

import diffusers
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

import imvar
from imvar.config import to_jsonable
from tests.support.random_checkpoint import TINY_CHECKER, TINY_ENCODER, TINY_UNET, TINY_VAE, randomize

UNETS = {
    "tiny": {},
    "one level": {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    },
    "as published, narrow": {
        "block_out_channels": (8, 16, 32, 32),
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "attention below": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "heads by level": {"attention_head_dim": (2, 8)},
    "three layers, four groups": {"layers_per_block": 3, "norm_num_groups": 4, "norm_eps": 1e-4},
    "two blocks deep": {"transformer_layers_per_block": 2},
    "other clock": {"flip_sin_to_cos": False, "freq_shift": 1, "time_embedding_dim": 40},
    "odd width, heads only where they attend": {
        "block_out_channels": (15, 32),
        "norm_num_groups": 1,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "other channels": {"in_channels": 9, "out_channels": 5, "cross_attention_dim": 7},
}
VAES = {
    "tiny": {},
    "one level": {
        "block_out_channels": (16,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
    },
    "two layers, four groups": {"layers_per_block": 2, "norm_num_groups": 4, "latent_channels": 3},
    "f4": {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    },
}
TOWERS = {
    "tiny": {},
    "gelu": {"hidden_act": "gelu", "layer_norm_eps": 1e-4},
    "one layer, odd patches": {"num_hidden_layers": 1, "image_size": 35, "patch_size": 10, "num_attention_heads": 2},
}


def same(ours, theirs, tolerance=1e-5):
    """Largest difference within `tolerance` of the largest value."""
    assert ours.shape == theirs.shape
    largest = theirs.abs().max()
    assert largest > 1e-2  # a comparison of nothing shows nothing
    assert (ours - theirs).abs().max() <= tolerance * largest


def pair(reference, our_class, folder):
    """The reference with random weights, and ours loaded from what it saved."""
    randomize(reference, 1).save_pretrained(folder)
    return our_class.from_pretrained(folder), reference


@pytest.fixture(params=UNETS, ids=str)
def unets(request, tmp_path):
    config = TINY_UNET | UNETS[request.param]
    return pair(diffusers.UNet2DConditionModel(**config), imvar.UNet2DConditionModel, tmp_path)


def settings(config):
    """What a config says, comparable whether it came from JSON or from Python."""
    return {key: str(to_jsonable(value)) for key, value in config.items() if not key.startswith("_")}


def unet_inputs(config, size=(8, 8), tokens=1, batch=2):
    torch.manual_seed(2)
    return torch.randn(batch, config.in_channels, *size), torch.randn(batch, tokens, config.cross_attention_dim)


@torch.no_grad()
@pytest.mark.parametrize(("h", "w", "tokens"), [(8, 8, 1), (8, 8, 77), (9, 13, 1), (1, 5, 2), (16, 7, 2)])
def test_unet(unets, h, w, tokens):
    ours, theirs = unets
    x, context = unet_inputs(theirs.config, (h, w), tokens)
    for t in (0, 981, 499.5, torch.tensor(7), torch.tensor([3, 640])):
        same(ours(x, t, context).sample, theirs(x, t, context).sample)


@torch.no_grad()
def test_unet_outputs_and_configs(unets):
    ours, theirs = unets
    x, context = unet_inputs(theirs.config)
    output = ours(x, 5, encoder_hidden_states=context)
    assert torch.equal(output.sample, output["sample"])
    assert torch.equal(output.sample, output[0])
    assert torch.equal(output.sample, ours(x, 5, context, return_dict=False)[0])
    assert settings(ours.config).items() >= settings(theirs.config).items()


@torch.no_grad()
def test_unet_there_and_back(unets, tmp_path):
    ours, theirs = unets
    ours.save_pretrained(tmp_path / "back")
    back = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "back")
    assert settings(back.config) == settings(theirs.config)
    assert back.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in back.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "dtype", "tolerance"),
    [
        ((8, 8), torch.float32, 1e-5),
        ((5, 7), torch.float32, 1e-5),
        ((8, 8), torch.float64, 1e-6),
        ((2, 2), torch.float64, 1e-6),  # where groups of two nearly equal pixels magnify any rounding
    ],
    ids=str,
)
def test_freeu(unets, size, dtype, tolerance):
    ours, theirs = (model.to(dtype) for model in unets)
    x, context = (tensor.to(dtype) for tensor in unet_inputs(theirs.config, size))
    plain = ours(x, 5, context).sample
    for model in (ours, theirs):
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    same(ours(x, 5, context).sample, theirs(x, 5, context).sample, tolerance)
    assert not torch.equal(ours(x, 5, context).sample, plain)
    ours.disable_freeu()
    assert torch.equal(ours(x, 5, context).sample, plain)


def gradients(model, inputs, weight):
    model.zero_grad()
    (model(*inputs).sample * weight).sum().backward()


def same_gradients(ours, theirs):
    """In double precision, so that a difference of formulas cannot hide behind one of rounding."""
    mapped = ours.keymap.to_file({name: p.grad for name, p in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        assert (mapped[name] - parameter.grad).abs().max() <= 1e-10 * max(parameter.grad.abs().max(), 1e-3)


@pytest.mark.parametrize("tokens", [1, 3])
def test_unet_gradients(unets, tokens):
    ours, theirs = unets
    x, context = (t.double() for t in unet_inputs(theirs.config, tokens=tokens))
    weight = torch.randn(2, theirs.config.out_channels, 8, 8)
    for model in (ours.train().double(), theirs.train().double()):
        gradients(model, (x, 5, context), weight)
    same_gradients(ours, theirs)

    plain = {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}
    ours.enable_gradient_checkpointing()
    gradients(ours, (x, 5, context), weight)
    for name, parameter in ours.named_parameters():
        if name in plain:
            assert torch.equal(parameter.grad, plain[name])


@torch.no_grad()
def test_bfloat16_is_as_near_as_the_reference(unets):
    ours, theirs = unets
    x, context = unet_inputs(theirs.config)
    exact = theirs(x, 5, context).sample
    half = [model.bfloat16()(x.bfloat16(), 5, context.bfloat16()).sample for model in (ours, theirs)]
    assert half[0].dtype == torch.bfloat16
    assert (half[0].float() - exact).abs().max() <= 1.1 * (half[1].float() - exact).abs().max()
    assert (half[0] - half[1]).float().abs().max() <= (half[1].float() - exact).abs().max()


@pytest.fixture(params=VAES, ids=str)
def vaes(request, tmp_path):
    return pair(diffusers.AutoencoderKL(**(TINY_VAE | VAES[request.param])), imvar.AutoencoderKL, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 4), (5, 7), (1, 3)], ids=str)
def test_vae(vaes, size):
    ours, theirs = vaes
    factor = 2 ** (len(theirs.config.block_out_channels) - 1)
    torch.manual_seed(2)
    z, x = torch.randn(2, theirs.config.latent_channels, *size), torch.randn(2, 3, *(factor * n for n in size))
    same(ours.decode(z).sample, theirs.decode(z).sample)
    same(ours.decode(z, return_dict=False)[0], theirs.decode(z).sample)
    mine, other = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
    same(mine.parameters, other.parameters)
    same(mine.mode(), other.mode())
    same(mine.kl(), other.kl())
    same(mine.nll(mine.mean + 0.3), other.nll(other.mean + 0.3))
    same(mine.kl(ours.encode(-x).latent_dist), other.kl(theirs.encode(-x).latent_dist))
    draws = [dist.sample(torch.Generator().manual_seed(3)) for dist in (mine, other)]
    same(*draws)
    passes = [m(x, sample_posterior=True, generator=torch.Generator().manual_seed(3)).sample for m in (ours, theirs)]
    same(*passes)


@torch.no_grad()
@pytest.mark.parametrize("size", [(9, 9), (17, 12), (8, 30)], ids=str)
def test_vae_in_slices_and_tiles(vaes, size):
    ours, theirs = vaes
    factor = 2 ** (len(theirs.config.block_out_channels) - 1)
    z, x = torch.randn(2, theirs.config.latent_channels, *size), torch.randn(2, 3, *(factor * n for n in size))
    for model in (ours, theirs):
        model.enable_slicing()
    same(ours.decode(z).sample, theirs.decode(z).sample)
    same(ours.encode(x).latent_dist.parameters, theirs.encode(x).latent_dist.parameters)
    for model in (ours, theirs):
        model.enable_tiling()
    same(ours.decode(z).sample, theirs.decode(z).sample)
    same(ours.encode(x).latent_dist.parameters, theirs.encode(x).latent_dist.parameters)
    assert (ours.tile_latent_min_size, ours.tile_sample_min_size) == (
        theirs.tile_latent_min_size,
        theirs.tile_sample_min_size,
    )


def test_vae_gradients(vaes):
    ours, theirs = vaes
    x = torch.randn(1, 3, 16, 16).double()
    for model in (ours.train().double(), theirs.train().double()):
        gradients(model, (x,), torch.arange(3.0)[:, None, None])
    same_gradients(ours, theirs)
    plain = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.enable_gradient_checkpointing()
    gradients(ours, (x,), torch.arange(3.0)[:, None, None])
    assert all(torch.equal(p.grad, plain[name]) for name, p in ours.named_parameters())


@torch.no_grad()
def test_vae_there_and_back(vaes, tmp_path):
    ours, theirs = vaes
    ours.save_pretrained(tmp_path / "back")
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "back").state_dict()
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in back.items())


@torch.no_grad()
@pytest.mark.parametrize("tower", TOWERS)
def test_clip(tower, tmp_path):
    config = transformers.CLIPVisionConfig(**(TINY_ENCODER | TOWERS[tower]))
    theirs = transformers.CLIPVisionModelWithProjection(config)
    ours, theirs = pair(theirs, imvar.CLIPVisionModelWithProjection, tmp_path)
    pixels = torch.randn(3, 3, config.image_size, config.image_size)
    mine, other = ours(pixels, output_hidden_states=True), theirs(pixels, output_hidden_states=True)
    assert list(mine) == list(other)
    same(mine.image_embeds, other.image_embeds)
    same(mine.last_hidden_state, other.last_hidden_state)
    for state, reference in zip(mine.hidden_states, other.hidden_states, strict=True):
        same(state, reference)
    assert torch.equal(ours(pixels, return_dict=False)[0], mine.image_embeds)
    assert torch.equal(ours(pixels.double()).image_embeds, theirs(pixels.double()).image_embeds)  # inputs are cast
    ours.save_pretrained(tmp_path / "back")
    back = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "back")
    assert torch.equal(back(pixels).image_embeds, other.image_embeds)
    from_object = imvar.CLIPVisionModelWithProjection(config)
    assert from_object.state_dict().keys() == ours.state_dict().keys()


@pytest.mark.parametrize("tower", TOWERS)
def test_clip_gradients(tower, tmp_path):
    config = transformers.CLIPVisionConfig(**(TINY_ENCODER | TOWERS[tower]))
    theirs = transformers.CLIPVisionModelWithProjection(config)
    ours, theirs = pair(theirs, imvar.CLIPVisionModelWithProjection, tmp_path)
    pixels = torch.randn(2, 3, config.image_size, config.image_size).double()
    for model in (ours.train().double(), theirs.train().double()):
        model(pixels).image_embeds.square().sum().backward()
    same_gradients(ours, theirs)
    plain_grads = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    ours.gradient_checkpointing_enable()
    ours(pixels).image_embeds.square().sum().backward()
    assert all(torch.equal(p.grad, plain_grads[name]) for name, p in ours.named_parameters())


def cosines(theirs, pixels):
    embeds = torch.nn.functional.normalize(theirs.visual_projection(theirs.vision_model(pixels)[1]))
    return [embeds @ torch.nn.functional.normalize(c).T for c in (theirs.special_care_embeds, theirs.concept_embeds)]


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
def test_safety_checker(seed, tmp_path):
    """Thresholds beside the pictures' own cosines, so that decisions are close and special care matters."""
    theirs = randomize(StableDiffusionSafetyChecker(transformers.CLIPConfig(**TINY_CHECKER)), seed)
    torch.manual_seed(seed)
    pixels, images = torch.randn(8, 3, 32, 32), torch.rand(8, 3, 4, 4)
    for thresholds, cosine in zip(
        (theirs.special_care_embeds_weights, theirs.concept_embeds_weights), cosines(theirs, pixels), strict=True
    ):
        thresholds.copy_(cosine.max(dim=0).values - 0.02 * torch.rand(cosine.shape[1]) + 0.006)
    theirs.save_pretrained(tmp_path)
    ours = imvar.StableDiffusionSafetyChecker.from_pretrained(tmp_path)

    black, flags = theirs(pixels, images.clone())
    mine, my_flags = ours(pixels, images)
    assert my_flags == flags
    assert torch.equal(mine, black)
    arrays, array_flags = ours(pixels, images.permute(0, 2, 3, 1).numpy())
    assert array_flags == flags
    assert torch.equal(torch.from_numpy(arrays).permute(0, 3, 1, 2), black)

    special, concepts = ours.scores(pixels)
    for scores, cosine, thresholds in zip(
        (special, concepts),
        cosines(theirs, pixels),
        (theirs.special_care_embeds_weights, theirs.concept_embeds_weights),
        strict=True,
    ):
        excess = scores - (cosine - thresholds)
        assert bool(((excess.abs() <= 5.1e-4) | ((excess - 0.01).abs() <= 5.1e-4)).all())
    ours.save_pretrained(tmp_path / "back")
    assert StableDiffusionSafetyChecker.from_pretrained(tmp_path / "back")(pixels, images.clone())[1] == flags


def test_the_safety_cases_are_mixed(tmp_path):
    """The pictures above are flagged in part, and special care decides for some: else they would show little."""
    flagged = stricter = 0
    for seed in range(6):
        checker = randomize(imvar.StableDiffusionSafetyChecker(**TINY_CHECKER), seed)
        torch.manual_seed(seed)
        pixels = torch.randn(8, 3, 32, 32)
        for thresholds in (checker.special_care_embeds_weights, checker.concept_embeds_weights):
            torch.nn.init.zeros_(thresholds)
        for thresholds, cosine in zip(
            (checker.special_care_embeds_weights, checker.concept_embeds_weights), checker.scores(pixels), strict=True
        ):
            thresholds.data.copy_(cosine.max(dim=0).values - 0.02 * torch.rand(cosine.shape[1]) + 0.006)
        special, concepts = checker.scores(pixels)
        flagged += int((concepts > 0).any(dim=1).sum())
        stricter += int((special > 0).any(dim=1).sum())
    assert 0 < flagged < 48
    assert 0 < stricter < 48
