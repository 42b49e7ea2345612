"""Reports of a run: a log, a plot of the loss, grids of samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imvar import StableDiffusionImageVariationPipeline, make_image_grid
from imvar.atomic.file import atomic_write, write_text

STEPS, GUIDANCE, SEEDS = 20, 3.0, (0, 1, 2)


class Log:
    """`log.jsonl`, with the lines of a run up to the step that it continues from, and its plot, `loss.png`."""

    def __init__(self, out: Path, step: int):
        self.path, self.plot = out / "log.jsonl", out / "loss.png"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.rows = [row for row in map(json.loads, lines) if row["step"] <= step]
        write_text(self.path, "".join(f"{json.dumps(row)}\n" for row in self.rows))

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and print it."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(row)}\n")
        print("  ".join(f"{name} {value:.6g}" for name, value in row.items()), flush=True)

    def draw(self) -> None:
        """Write the plot of all losses in the log."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for name in ("loss", "validation loss"):
            points = [(row["step"], row[name]) for row in self.rows if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker="o" if name != "loss" else "")
        axes.set(xlabel="step", ylabel="loss")
        axes.legend()
        atomic_write(self.plot, lambda temporary: figure.savefig(temporary, format="png", dpi=100))


def sample_grid(pipe: Any, example: dict[str, Tensor]) -> Image.Image:
    """Return a grid with a row for each image of a batch: its reconstruction by the VAE, and a variation per seed."""
    sampler: Any = StableDiffusionImageVariationPipeline(
        **pipe.components | {"safety_checker": None}, requires_safety_checker=False
    )
    sampler.set_progress_bar_config(disable=True)
    with torch.no_grad():
        decoded = pipe.vae.decode(example["mean"].to(pipe.vae.device, pipe.vae.dtype)).sample
    cells = list(sampler.image_processor.postprocess(decoded.float()))
    for seed in SEEDS:
        cells += sampler(
            image_embeds=example["embedding"][:, None],
            seed=seed,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
        ).images
    rows = np.arange(len(cells)).reshape(1 + len(SEEDS), -1).T.reshape(-1)
    return make_image_grid([cells[i] for i in rows], len(cells) // (1 + len(SEEDS)), 1 + len(SEEDS))


def mean_loss(losses: Sequence[Tensor]) -> float:
    return float(torch.cat(list(losses)).mean())
