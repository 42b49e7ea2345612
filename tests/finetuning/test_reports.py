"""The log, the plot and the samples of a run, which change nothing of the training."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from finetuning.loop import Trainer
from finetuning.reports import Log, read_log, running_mean, sample_grid
from finetuning.settings import Settings
from finetuning.state import read_state
from PIL import Image

from tests.support.batches import save_drawings

ROWS = [{"step": step, "loss": 1 / step} for step in (10, 20, 30)]
SCRIPTS = Path(__file__).parents[2] / "scripts"


def example_of(pipe, images=2):
    """Return the tensors of a bank for the samples: latents of 8 x 8."""
    generator = torch.Generator().manual_seed(0)
    channels, width = pipe.vae.config.latent_channels, pipe.unet.config.cross_attention_dim
    return {
        "mean": torch.randn(images, channels, 8, 8, generator=generator),
        "embedding": torch.randn(images, width, generator=generator),
    }


@pytest.fixture
def trained(checkpoint, tmp_path):
    """Return a function that trains for ten steps and returns the folder of the run."""
    photos = save_drawings(tmp_path / "drawings", "fox", "panda")

    def run(name, **options):
        values = {"stage": "unet", "steps": 10, "batch": 2, "log_every": 5, "workers": 0, "cpu": True} | options
        settings = Settings([str(photos)], tmp_path / name, str(checkpoint), learning_rate=1e-3, samples=1, **values)
        Trainer(settings).train()
        return settings.out

    return run


def test_a_log_continues_at_a_step(tmp_path):
    """A line that a killed run has not finished is dropped, and so are those after the step."""
    log = Log(tmp_path, 0)
    for row in ROWS:
        log.add(row)
    with log.path.open("a") as file:
        file.write('{"step": 40, "lo')
    assert read_log(tmp_path) == ROWS
    continued = Log(tmp_path, 20)
    continued.add({"step": 25, "loss": 0.5})
    assert read_log(tmp_path) == continued.rows == [*ROWS[:2], {"step": 25, "loss": 0.5}]


def test_a_log_with_a_broken_line(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 10}\n{"step": 2\n{"step": 30}\n')
    with pytest.raises(SystemExit, match=r"log\.jsonl: expected JSON in line 2, got"):
        Log(tmp_path, 30)


def test_a_running_mean():
    np.testing.assert_allclose(running_mean([1.0, 3.0, 5.0, 7.0], 2), [1, 2, 4, 6])
    np.testing.assert_allclose(running_mean([4.0, 2.0], 5), [4, 3])


def test_the_plot_of_any_log(tmp_path):
    """matplotlib is imported by the first drawing alone."""
    code = f"""if True:
        import sys
        from pathlib import Path
        from finetuning.reports import Log
        log = Log(Path({str(tmp_path)!r}), 0)
        log.draw() if len(sys.argv) > 1 else None
        for step in range(1, 60):
            log.add({{"step": step, "loss": 1 / step}} | ({{"validation loss": 0.5}} if step % 20 == 0 else {{}}))
            if step == 1:
                assert ("matplotlib" in sys.modules) == (len(sys.argv) > 1)
                log.draw()
        log.draw()
    """
    for empty in ([], ["empty"]):
        subprocess.run([sys.executable, "-c", code, *empty], check=True, cwd=SCRIPTS, timeout=300)
        assert Image.open(tmp_path / "loss.png").size == (800, 450)


@pytest.mark.parametrize("is_training", [True, False])
def test_samples_change_no_state(pipe, is_training):
    """Modes, gradients and random numbers stay; the encoders may be in half precision beside a UNet in float32."""
    pipe.vae.to(torch.bfloat16)
    pipe.image_encoder.to(torch.bfloat16)
    pipe.unet.train(is_training)
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    grid = sample_grid(pipe, example_of(pipe))
    assert grid.size == (4 * 128, 2 * 128)
    assert torch.get_rng_state().equal(state)
    assert all(module.training == is_training for module in pipe.unet.modules())
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())
    assert all(before[name].equal(value) for name, value in pipe.unet.state_dict().items())
    assert pipe.safety_checker is not None


def test_samples_have_a_row_for_each_image(pipe):
    """Its first cell is the image; another embedding and another seed make another image."""
    example = example_of(pipe)
    cells = np.asarray(sample_grid(pipe, example)).reshape(2, 128, 4, 128, 3).swapaxes(1, 2)
    with torch.no_grad():
        decoded = pipe.image_processor.postprocess(pipe.vae.decode(example["mean"]).sample)
    for row, image in zip(cells, decoded, strict=True):
        np.testing.assert_array_equal(row[0], np.asarray(image.resize((128, 128), Image.Resampling.NEAREST)))
        assert not np.array_equal(row[1], row[2])
    assert not np.array_equal(cells[0, 1], cells[1, 1])


def test_sampling_and_validating_change_no_weight(trained, tmp_path):
    """A run that samples several times has bit for bit the weights of one that samples at its end."""
    validate = [str(tmp_path / "drawings")]
    often = trained("often", sample_every=6, validate=validate)
    seldom = trained("seldom", sample_every=100)
    first, second = read_state(often), read_state(seldom)
    for part in ("parameters", "average"):
        assert all(second[part][name].equal(value) for name, value in first[part].items())
    names = [f"step-{step:06}.png" for step in (0, 6, 10)]
    assert sorted(path.name for path in (often / "samples").iterdir()) == names
    assert sorted(path.name for path in (seldom / "samples").iterdir()) == [names[0], names[-1]]
    assert [row["step"] for row in read_log(often) if "validation loss" in row] == [0, 6, 10]
    record = json.loads((often / "training.json").read_text())
    assert record["images"] == 2
    assert record["settings"]["sample_every"] == 6
