"""The training of imvar-emoji: held-out data, resuming, and that the models learn."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch
from torch import nn
from train_emoji import autoencoder, classifiers, diffusion, encoder, examples, judging, loop, safety, views
from train_emoji import drawings as drawing_files
from train_emoji.catalogue import HELD_OUT_STYLES, REDUCED, SAFETY_CONCEPTS, STYLES, code, codes, full
from train_emoji.drawings import Drawings, concat, held_out, learnable
from train_emoji.measures import Share, accuracy, nearest, spread
from train_emoji.networks import Classifier, ranks

import imvar

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def drawings():
    """Noise for every style's drawing of every concept, of the checker's concepts, and of one other."""
    characters = codes([*REDUCED.concepts, *REDUCED.unseen, *SAFETY_CONCEPTS.values(), "🪜"])
    pairs = [(one, style.name) for one in characters for style in STYLES]
    images = torch.randint(0, 256, (len(pairs), 4, 64, 64), dtype=torch.uint8, generator=torch.manual_seed(0))
    return Drawings(images, np.array([one for one, _ in pairs]), np.array([style for _, style in pairs]))


# ---- held-out data


def test_held_out_data_is_not_trained_on(drawings):
    known, out = learnable(drawings, REDUCED), held_out(drawings, REDUCED)
    assert not {"openmoji"} & set(known.styles)
    assert not set(codes(REDUCED.unseen)) & set(known.codes)
    pairs = set(zip(known.codes.tolist(), known.styles.tolist(), strict=True))
    for character, style in REDUCED.held_out.items():
        assert (code(character), style) not in pairs
        if style == "fluent-flat":  # the same shapes as in the other Fluent style
            assert (code(character), "fluent-3d") not in pairs
    assert out.codes.tolist() == codes(REDUCED.held_out)
    assert set(out.styles) == set(HELD_OUT_STYLES)
    characters = len(REDUCED.concepts) + len(SAFETY_CONCEPTS) + 1
    assert len(known) == 5 * characters - len(out) - (out.styles == "fluent-flat").sum()


def test_the_concepts():
    assert len(set(REDUCED.concepts)) == len(REDUCED.concepts) == 187
    assert len(set(REDUCED.unseen)) == len(REDUCED.unseen) == 20
    assert not set(REDUCED.concepts) & set(REDUCED.unseen)
    assert {REDUCED.category(one) for one in REDUCED.unseen} == set(REDUCED.by_category)


def test_the_full_split_holds_out_all_of_the_reduced_one():
    available = {
        name: [
            *REDUCED.by_category[name],
            *REDUCED.unseen_by_category[name],
            *map(chr, range(0x4E00 + 100 * i, 0x4E00 + 100 * i + 50)),
        ]
        for i, name in enumerate(REDUCED.by_category)
    }
    split = full(available)
    assert set(split.concepts) > set(REDUCED.concepts)
    assert set(split.unseen) > set(REDUCED.unseen)
    assert split.held_out.items() > REDUCED.held_out.items()
    assert not set(split.concepts) & set(split.unseen)
    assert len(split.concepts) + len(split.unseen) == 207 + 300


def test_pairs_are_of_one_concept_by_two_vendors(drawings):
    known = learnable(drawings, REDUCED)
    names = sorted(set(known.codes.tolist()))
    pairs = classifiers.Pairs(known, names, codes(REDUCED.concepts[:3]), 0.5, CPU)
    concept, first, second = pairs.draw(400, torch.Generator().manual_seed(0))
    for which, one, two in zip(concept.tolist(), first.tolist(), second.tolist(), strict=True):
        assert known.codes[one] == known.codes[two] == names[which]
        assert known.styles[one] != known.styles[two]
    share = np.isin(known.codes[first], codes(REDUCED.concepts[:3])).mean()
    assert 0.4 < share < 0.6


# ---- the loop


def job(evaluate=None, average=0.9):
    torch.manual_seed(5)
    model = nn.Linear(4, 1)

    def loss(generator):
        x = torch.randn(8, 4, generator=generator)
        return ((model(x).float() - x.sum(1, keepdim=True)) ** 2).mean()

    return loop.Job("line", model, loss, 8, rate=0.05, average=average, evaluate=evaluate)


@pytest.fixture
def clock(monkeypatch):
    """Advance time by one second per call."""
    now = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))


def test_it_learns_in_the_planned_time(clock, tmp_path):
    model, figures = loop.train(job(), tmp_path, 20, 0, CPU)
    assert (model.weight - 1).abs().max() < 0.2
    assert figures["seconds"] >= 1200
    assert figures["samples"] == 8 * figures["step"]
    log = [json.loads(line) for line in (tmp_path / "line.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == figures["step"]
    assert log[0]["loss"] > 10 * log[-1]["loss"]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    def seconds_per_step():
        now = iter(range(10**6))
        monkeypatch.setattr(time, "monotonic", lambda: next(now) / 2)  # two calls per step

    seconds_per_step()
    whole, _ = loop.train(job(), tmp_path / "whole", 2, 0, CPU)
    seconds_per_step()
    _, stopped = loop.train(job(), tmp_path / "parts", 2, 0, CPU, until=60)
    assert stopped["seconds"] < 120
    seconds_per_step()
    before = torch.load(tmp_path / "parts" / "line.pt", weights_only=True)
    _, longer = loop.train(job(), tmp_path / "parts", 2, 0, CPU, until=1)
    after = torch.load(tmp_path / "parts" / "line.pt", weights_only=True)
    n = stopped["step"]
    assert longer["step"] == n + 1
    expected = before["average"]["weight"].lerp(after["model"]["weight"], 1 - min(0.9, (1 + n) / (10 + n)))
    assert torch.allclose(after["average"]["weight"], expected)
    seconds_per_step()
    parts, figures = loop.train(job(), tmp_path / "parts", 2, 0, CPU)
    assert figures["seconds"] >= 120
    assert torch.allclose(
        whole.weight, parts.weight, atol=0.02
    )  # the learning rate depends on time, the batches on the step
    again, same = loop.train(job(), tmp_path / "parts", 2, 0, CPU)
    assert torch.equal(again.weight, parts.weight)
    assert same == figures


def test_a_stripped_state_has_the_trained_weights_and_is_not_continued(clock, tmp_path):
    trained, figures = loop.train(job(), tmp_path, 1, 0, CPU)
    loop.strip(tmp_path / "line.pt")
    assert torch.load(tmp_path / "line.pt", weights_only=True).keys() == {"average", "progress", "dependencies"}
    loaded, same = loop.train(job(), tmp_path, 1, 0, CPU)
    assert torch.equal(loaded.weight, trained.weight)
    assert same == figures
    with pytest.raises(SystemExit, match=r"line\.pt: it was stripped, so it cannot be continued"):
        loop.train(job(), tmp_path, 2, 0, CPU)


def test_a_stage_whose_dependencies_changed(clock, tmp_path):
    loop.train(job(), tmp_path, 1, 0, CPU, dependencies={"seed": 0, "vae": 3})
    with pytest.raises(SystemExit, match=r"line\.pt: expected seed 0, vae 4, got seed 0, vae 3"):
        loop.train(job(), tmp_path, 2, 0, CPU, dependencies={"seed": 0, "vae": 4})
    _, figures = loop.train(job(), tmp_path, 2, 0, CPU, dependencies={"seed": 0, "vae": 4}, keep=True)
    assert figures["seconds"] >= 120


def test_the_ema_is_evaluated_and_saved(clock, tmp_path):
    seen = []

    def evaluate(model):
        seen.append((model.weight.clone(), model.training))
        return {"first": model.weight[0, 0].item()}

    one = job(evaluate)
    model, figures = loop.train(one, tmp_path, 20, 0, CPU)
    assert len(seen) > 2
    assert not any(training for _, training in seen)
    assert torch.equal(seen[-1][0], model.weight)
    assert figures["first"] == model.weight[0, 0].item()
    saved = torch.load(tmp_path / "line.pt", weights_only=True)
    assert torch.equal(saved["average"]["weight"], model.weight)
    assert not torch.equal(saved["model"]["weight"], model.weight)


def test_buffers_are_averaged_and_counts_copied():
    model = nn.BatchNorm1d(4)
    average, expected = loop.averaged(model, 0.3), None
    for step in range(4):
        model(torch.randn(8, 4) + step)
        average.update_parameters(model)
        decay = min(0.3, (1 + step) / (10 + step))  # shorter at the beginning
        expected = model.running_mean.clone() if step == 0 else expected.lerp(model.running_mean, 1 - decay)
    assert torch.allclose(average.module.running_mean, expected)
    assert average.module.num_batches_tracked == 4


def test_a_non_finite_loss_stops_training(clock, tmp_path):
    bad = job()
    bad.loss = lambda generator: bad.model.weight.sum() * math.nan
    with pytest.raises(SystemExit, match="line: the loss is not finite at step 0"):
        loop.train(bad, tmp_path, 5, 0, CPU)


# ---- imvar's modules learn


MODELS = {
    "unet": (
        lambda: imvar.UNet2DConditionModel(**diffusion.SETTINGS),
        lambda m, x: (
            m(
                x[:, :1].repeat(1, 4, 1, 1)[..., ::4, ::4], torch.arange(len(x)) * 100, x.flatten(1)[:, None, :128]
            ).sample
        ),
    ),
    "vae": (lambda: imvar.AutoencoderKL(**autoencoder.SETTINGS), lambda m, x: m(x[..., ::4, ::4]).sample),
    "encoder": (lambda: imvar.CLIPVisionModelWithProjection(**encoder.SETTINGS), lambda m, x: m(x).image_embeds),
    "checker": (lambda: imvar.StableDiffusionSafetyChecker(**safety.SETTINGS), safety.embed),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_fits_a_batch_in_half_precision(name):
    make, run = MODELS[name]
    torch.manual_seed(0)
    model, x = make().train(), torch.randn(2, 3, 64, 64)
    loop.use_unfused_attention_on_cpu(model, CPU)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            output = run(model, x)
        losses.append((output.float() - 0.7).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["unet", "vae", "encoder"])
def test_gradients_are_the_same_with_checkpointing_and_with_either_attention(name):
    make, run = MODELS[name]
    torch.manual_seed(0)
    model, x = make().train(), torch.randn(2, 3, 64, 64)
    grads = []
    for change in (
        lambda: None,
        lambda: loop.use_unfused_attention_on_cpu(model, CPU),
        getattr(model, "enable_gradient_checkpointing", None) or model.gradient_checkpointing_enable,
    ):
        change()
        run(model, x).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    for other in grads[1:]:
        assert other.keys() == grads[0].keys()
        for n, grad in grads[0].items():
            assert (other[n] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-7, n


# ---- components of a job


@pytest.mark.parametrize("strong", [True, False])
def test_views(drawings, strong):
    seen = views.view(drawings.images[:32], torch.Generator().manual_seed(0), strong=strong)
    again = views.view(drawings.images[:32], torch.Generator().manual_seed(0), strong=strong)
    assert seen.shape == (32, 3, 64, 64)
    assert 0 <= seen.min() <= seen.max() <= 1
    assert torch.equal(seen, again)
    assert (seen[0] - seen[1]).abs().mean() > 0.01


def test_an_identity_transform_keeps_the_drawing(drawings):
    generator = torch.Generator().manual_seed(0)
    identity = views.random_affine(
        views.premultiply_alpha(drawings.images[:4]), generator, turn=0, scale=(1, 1), shift=0
    )
    assert torch.allclose(views.composite(identity), drawings.take(torch.arange(4)).rgb(), atol=1e-4)


@torch.no_grad()
def test_normalised_latents_decode_to_the_same_images(drawings):
    torch.manual_seed(0)
    vae, rgb = imvar.AutoencoderKL(**autoencoder.SETTINGS).eval(), drawings.take(torch.arange(16)).rgb()
    before, posterior = autoencoder.reconstruct(vae, rgb), vae.encode(rgb * 2 - 1).latent_dist
    mean, deviation = posterior.mean.mean((0, 2, 3)), posterior.mean.std((0, 2, 3))
    autoencoder.normalize(vae, rgb)
    after = vae.encode(rgb * 2 - 1).latent_dist
    assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(4), atol=1e-4)
    assert torch.allclose(after.std * deviation.view(-1, 1, 1), posterior.std, rtol=1e-3)
    assert torch.allclose(after.mean * deviation.view(-1, 1, 1) + mean.view(-1, 1, 1), posterior.mean, atol=1e-4)
    assert torch.allclose(autoencoder.reconstruct(vae, rgb), before, atol=1e-5)


@torch.no_grad()
def test_embeddings_are_scaled_to_the_norm_for_the_unet(drawings):
    torch.manual_seed(0)
    model, rgb = imvar.CLIPVisionModelWithProjection(**encoder.SETTINGS).eval(), drawings.take(torch.arange(16)).rgb()
    encoder.normalize(model, rgb)
    lengths = model(encoder.pixels(rgb)).image_embeds.norm(dim=-1)
    assert lengths.mean() == pytest.approx(encoder.LENGTH, rel=1e-4)


def test_pixels_equal_those_of_the_image_processor(drawings):
    rgb = drawings.take(torch.arange(3)).rgb()
    pil = [imvar.VaeImageProcessor.numpy_to_pil(one.permute(1, 2, 0).numpy()[None])[0] for one in rgb]
    theirs = imvar.CLIPImageProcessor(**encoder.EXTRACTOR)(pil, return_tensors="pt").pixel_values
    assert torch.allclose(encoder.pixels(rgb), theirs, atol=0.01)


def test_a_calibrated_checker_flags_little_else(drawings):
    torch.manual_seed(0)
    checker = imvar.StableDiffusionSafetyChecker(**safety.SETTINGS).eval()
    figures = safety.calibrate(checker, drawings.where(np.arange(len(drawings)) % 3 == 0), 0)
    assert figures["flagged of anything else"] <= safety.FALSE_POSITIVES
    used = checker.concept_embeds_weights < safety.NEVER
    assert used.sum() == len(SAFETY_CONCEPTS)
    assert (checker.special_care_embeds_weights == safety.NEVER).all()


def test_both_prediction_types_give_x0_and_noise():
    schedule = imvar.DDIMScheduler(**diffusion.SCHEDULER)
    x0, eps = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    for t in (0, 500, 999):
        timesteps = torch.tensor([t, t])
        noisy = schedule.add_noise(x0, eps, timesteps)
        for kind, output in (("epsilon", eps), ("v_prediction", schedule.get_velocity(x0, eps, timesteps))):
            clean, noise = diffusion.to_x0_and_eps(
                imvar.DDIMScheduler(**diffusion.SCHEDULER, prediction_type=kind), output, noisy, t
            )
            assert torch.allclose(clean, x0, atol=1e-4)
            assert torch.allclose(noise, eps, atol=1e-4)


@torch.no_grad()
def test_errors_of_a_perfect_unet():
    latents = torch.randn(3, 4, 16, 16)
    schedule = imvar.DDIMScheduler(**diffusion.SCHEDULER)

    def perfect(noisy, time, embeddings, return_dict):
        alpha = schedule.alphas_cumprod[time]
        return ((noisy - alpha.sqrt() * latents) / (1 - alpha).sqrt(),)

    assert max(diffusion.errors(perfect, latents, torch.zeros(3, 128), "epsilon").values()) < 1e-5
    assert min(diffusion.errors(lambda *_, **__: (latents,), latents, torch.zeros(3, 128), "epsilon").values()) > 0.1


# ---- the judge and the metrics


def test_the_file_of_the_judge(tmp_path):
    torch.manual_seed(0)
    judge = Classifier(["2600", "1f600"], width=8).eval()
    judging.write(judge, tmp_path / "judge.safetensors")
    back = judging.read(tmp_path / "judge.safetensors")
    assert back.names == judge.names
    rgb = torch.rand(3, 3, 64, 64)
    assert torch.allclose(back(rgb), judge.float()(rgb), atol=0.05)


def test_ranks_and_shares():
    scores = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3]])
    assert ranks(scores, torch.tensor([1, 1])).tolist() == [1, 2]
    share = Share(0.5, 100)
    assert share.error == pytest.approx(0.05)
    assert str(share) == "50.0 ± 5.0 %"


def test_accuracy_spread_and_nearest():
    torch.manual_seed(0)
    judge = Classifier(["a", "b", "c", "d", "e", "f"], width=8).eval()
    images = torch.rand(8, 3, 64, 64)
    with torch.no_grad():
        best = [judge.names[i] for i in judge(images).argmax(1)]
    result = accuracy(judge, images, best, list(judge.names))
    assert (result.top1.value, result.top5.value, result.top1.n) == (1, 1, 8)
    within, between, least = spread(judge, torch.cat([images[:4], images[:4]]), 4)
    assert within == pytest.approx(0, abs=1e-3)
    assert between > 0
    assert least == pytest.approx(0, abs=1e-6)
    assert nearest(images, images).max() == pytest.approx(0, abs=1e-6)
    assert nearest(images, images[:4] / 2)[4:].min() > 0.1


def test_the_fixture_has_the_order_of_its_list(drawings, tmp_path):
    examples.write_fixture(tmp_path, drawings)
    entries = json.loads((tmp_path / "held-out.json").read_text(encoding="utf-8"))
    assert [entry["code"] for entry in entries] == codes(REDUCED.held_out)
    assert [entry["style"] for entry in entries] == list(REDUCED.held_out.values())


def test_concat(drawings):
    first, second = drawings.take(torch.arange(3)), drawings.take(torch.arange(5, 7))
    both = concat(first, second)
    assert len(both) == 5
    assert both.codes.tolist() == [*first.codes, *second.codes]


def test_rendering_ends_with_the_budget_and_resumes(tmp_path, monkeypatch):
    rendered = []

    def render(style, archive):
        rendered.append(style.name)
        return [("1f98a", style.name, np.zeros((4, 64, 64), np.uint8))]

    monkeypatch.setattr(drawing_files, "fetch", lambda style, folder: None)
    monkeypatch.setattr(drawing_files, "render", render)
    monkeypatch.setattr(time, "monotonic", lambda: len(rendered))
    with pytest.raises(SystemExit, match="the budget ended while drawings were rendered"):
        drawing_files.load(tmp_path, until=2)
    assert len(rendered) == 2
    assert drawing_files.load(tmp_path).styles.tolist() == rendered == [style.name for style in STYLES]
