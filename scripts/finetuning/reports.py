"""Reports of a run: a log, a plot of the loss, grids of samples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from imvar import StableDiffusionImageVariationPipeline, make_image_grid
from imvar.atomic.file import atomic_write, write_text
from imvar.errors import short_repr

STEPS, GUIDANCE, SEEDS = 20, 3.0, (0, 1, 2)
MIN_SIDE = 128  # pixels of a sample in a grid
MIN_ROWS, SMOOTH = 10, 0.05  # of the log, and the share of it, over which the running mean of the loss is taken
LOG = "log.jsonl"


class Log:
    """`log.jsonl`, with the lines of a run up to the step that it continues from, and its plot, `loss.png`."""

    def __init__(self, out: Path, step: int):
        self.path, self.plot = out / LOG, out / "loss.png"
        self.rows = [row for row in read_log(out) if row["step"] <= step]
        write_text(self.path, "".join(f"{json.dumps(row)}\n" for row in self.rows))

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and print it."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(row)}\n")
        print("  ".join(f"{name} {value:.6g}" for name, value in row.items()), flush=True)

    def draw(self) -> None:
        """Write the plot of all losses in the log. The first one imports matplotlib, which takes seconds."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        steps, losses = self.column("loss")
        width = max(MIN_ROWS, round(SMOOTH * len(losses)))
        is_smoothed = len(losses) > MIN_ROWS
        if losses:
            axes.plot(
                steps, losses, "C0", alpha=0.3 if is_smoothed else 1, label="loss", marker="." * (len(losses) == 1)
            )
        if is_smoothed:
            axes.plot(steps, running_mean(losses, width), "C0", label=f"loss, mean of {width} rows of the log")
        steps, losses = self.column("validation loss")
        if losses:
            axes.plot(steps, losses, "C1", label="validation loss", marker="o")
        axes.set(xlabel="step", ylabel="loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        atomic_write(self.plot, lambda temporary: figure.savefig(temporary, format="png", dpi=100))

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps and values of a quantity in the log."""
        rows = [row for row in self.rows if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]


def read_log(out: Path) -> list[dict[str, Any]]:
    """Return the rows of a log; a last line without an end, which a killed run leaves, is none."""
    path = out / LOG
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            got = short_repr(line)
            raise SystemExit(f"{path}: expected JSON in line {number}, got {got}; remove the line") from error
    return rows


def running_mean(values: list[float], width: int) -> np.ndarray:
    """Return the mean of each value and those before it, `width` in all, fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


@torch.no_grad()
def sample_grid(pipe: Any, example: dict[str, Tensor]) -> Image.Image:
    """Return a grid with a row for each image of a batch: its reconstruction by the VAE, and a variation per seed.

    The safety checker is not applied: the images are the training data and what the model makes of them, for the one
    who trains, and a black cell would hide what has been learned. The exported checkpoint has its safety checker.
    """
    sampler: Any = StableDiffusionImageVariationPipeline(
        **pipe.components | {"safety_checker": None}, requires_safety_checker=False
    )
    sampler.set_progress_bar_config(disable=True)
    with evaluating(pipe.unet):
        decoded = pipe.vae.decode(example["mean"].to(pipe.vae.device, pipe.vae.dtype)).sample
        height, width = decoded.shape[-2:]
        columns = [sampler.image_processor.postprocess(decoded.float())]
        for seed in SEEDS:
            made = sampler(
                image_embeds=example["embedding"][:, None],
                seed=seed,
                height=height,
                width=width,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
            )
            columns.append(made.images)
    cells = [image for row in zip(*columns, strict=True) for image in row]
    grid = make_image_grid(cells, len(cells) // len(columns), len(columns))
    factor = max(1, MIN_SIDE // min(height, width))
    return grid.resize((factor * grid.width, factor * grid.height), Image.Resampling.NEAREST)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode in the block, and continue after it with the random numbers from before it."""
    is_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        model.train(is_training)


def save_samples(grid: Image.Image, out: Path, step: int, tracker: Any) -> None:
    """Write a grid to `samples/` and to TensorBoard, by accelerate's tracker."""
    path = out / "samples" / f"step-{step:06}.png"
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, lambda temporary: grid.save(temporary, format="png"))
    tracker.log_images({"samples": np.asarray(grid)[None]}, step, dataformats="NHWC")
