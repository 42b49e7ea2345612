"""The parameters that are trained, their average, and the order of the examples."""

import pytest
import torch
from finetuning.examples import Examples, micro_batches
from finetuning.trainable import CONSTANT, MovingAverage, choose_parameters

from imvar import StableDiffusionImageVariationPipeline


@pytest.fixture
def unet():
    return StableDiffusionImageVariationPipeline.from_pretrained("imvar-emoji").unet


@pytest.mark.parametrize(("stage", "part"), [("cross-attention", ".attn2."), ("unet", ""), ("lora", ".lora_")])
def test_a_stage_trains_its_parameters_alone(unet, stage, part):
    names = set(dict(unet.named_parameters()))
    chosen = choose_parameters(unet, stage)
    assert set(chosen) == {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    if stage != "lora":
        assert set(chosen) == {name for name in names if part in name and not CONSTANT.search(name)}
        return
    assert all(".lora_" in name for name in chosen)
    assert {name.rpartition(".lora_")[0].rpartition(".attn")[2] for name in chosen} == {
        *(f"1.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"2.{layer}" for layer in ("to_v", "to_out.0")),
    }


def test_the_parameters_that_no_stage_trains_are_those_without_a_gradient(unet):
    unet.double().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(size, generator=generator).double() for size in ((2, 4, 8, 8), (2, 1, 128)))
    unet(x, torch.tensor([10, 900]), context).sample.square().mean().backward()
    largest = {name: float(parameter.grad.abs().max()) for name, parameter in unet.named_parameters()}
    assert {name for name, value in largest.items() if value < 1e-14} == {n for n in largest if CONSTANT.search(n)}


def test_the_average_follows_its_formula():
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    average = MovingAverage({"weight": weight}, 0.5)
    expected = 1.0
    for step in range(1, 30):
        with torch.no_grad():
            weight.fill_(float(step))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.means["weight"].tolist() == pytest.approx([expected], rel=1e-6)
    with average.applied():
        assert weight.tolist() == average.means["weight"].tolist()
    assert weight.tolist() == [29.0]


@pytest.mark.parametrize(("batch", "accumulate", "ranks"), [(8, 1, 1), (4, 2, 1), (4, 1, 2), (1, 2, 4)])
def test_a_step_has_the_same_examples_however_it_is_divided(batch, accumulate, ranks):
    per_rank = [list(micro_batches(3, 5, batch, accumulate, rank, ranks)) for rank in range(ranks)]
    for step in range(2):
        parts = [part for rank in per_rank for part in rank[step * accumulate : (step + 1) * accumulate]]
        assert sorted(number for part in parts for number in part) == [*range((3 + step) * 8, (4 + step) * 8)]


def test_an_epoch_has_each_image_once_in_an_order_of_its_own():
    images = [{"image": torch.tensor(i)} for i in range(50)]
    examples = Examples(images, (4, 2, 2), 1000, seed=7, drop=0.1)
    epochs = [[int(examples[number]["image"]) for number in range(i * 50, (i + 1) * 50)] for i in range(3)]
    assert all(sorted(epoch) == [*range(50)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != [*range(50)]


def test_each_example_has_random_numbers_of_its_own():
    examples = Examples([{}], (4, 8, 8), 1000, seed=0, drop=0.1)
    found = [examples[number] for number in range(2000)]
    noise = torch.stack([example["noise"].flatten() for example in found])
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.T.corrcoef().fill_diagonal_(0).abs().max()) < 0.13  # 5.8 standard errors, of 32,640 pairs
    neighbours = (noise[1:] * noise[:-1]).mean(1) * 16  # a standard normal variable each
    assert float(neighbours.std()) == pytest.approx(1, abs=0.08)
    timesteps = torch.stack([example["timestep"] for example in found]).float()
    assert float(timesteps.mean()) == pytest.approx(499.5, abs=30)
    assert float(torch.stack([example["is_dropped"] for example in found]).float().mean()) == pytest.approx(
        0.1, abs=0.03
    )
