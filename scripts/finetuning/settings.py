"""The settings of a fine-tuning run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEARNING_RATES = {"cross-attention": 1e-5, "unet": 1e-5, "lora": 1e-4}
STAGES = tuple(LEARNING_RATES)

FREE = {"images", "out", "steps", "batch", "gradient_accumulation", "bank", "workers", "shard", "cpu", "merge"}
FREE |= {"gradient_checkpointing", "validate", "skip_broken", "log_every", "save_every", "sample_every", "samples"}
"""The settings that may change when a run resumes."""


@dataclass(frozen=True)
class Settings:
    """The options of `scripts/finetune.py`, whose help explains them. `batch` is per rank and micro-step."""

    images: list[str]
    out: Path
    checkpoint: str = "imvar-emoji"
    revision: str | None = None
    stage: str = "lora"
    steps: int = 1000
    batch: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 1e-5
    warmup_steps: int = 0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    drop_embedding: float = 0.1
    snr_gamma: float | None = None
    ema_decay: float | None = 0.999
    rank: int = 16
    alpha: float | None = None
    resolution: int | None = None
    preprocess: str = "training"
    random_flip: bool = False
    skip_broken: bool = False
    seed: int = 0
    bank: bool = True
    workers: int = 2
    mixed_precision: str | None = None
    gradient_checkpointing: bool = False
    shard: bool = False
    validate: list[str] | None = None
    log_every: int = 10
    save_every: int = 100
    sample_every: int = 500
    samples: int = 4
    merge: bool = False
    cpu: bool = False

    def recipe(self, ranks: int) -> dict[str, Any]:
        """Return what determines the weights after a step, which a run that resumes shares with the first one.

        Ranks, batches and their accumulation count by their product, the size of a step.
        """
        ignored = FREE if self.stage == "lora" else FREE | {"rank", "alpha"}
        recipe = {name: value for name, value in vars(self).items() if name not in ignored}
        return recipe | {"step size": self.step_size(ranks)}

    def step_size(self, ranks: int) -> int:
        """Return the number of examples of an optimizer step."""
        return self.batch * self.gradient_accumulation * ranks
