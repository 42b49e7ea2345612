"""The settings of a fine-tuning run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGES = ("cross-attention", "unet", "lora")


@dataclass(frozen=True)
class Settings:
    """The options of `scripts/finetune.py`, whose help explains them. `batch` is per rank and micro-step."""

    images: list[str]
    out: Path
    model: str = "imvar-emoji"
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
    seed: int = 0
    bank: bool = True
    workers: int = 2
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    shard: bool = False
    validate: list[str] | None = None
    log_every: int = 10
    save_every: int = 500
    sample_every: int = 500
    samples: int = 4
    merge: bool = False
    cpu: bool = False

    def recipe(self, ranks: int) -> dict[str, Any]:
        """Return what determines the weights after a step, which a run that resumes shares with the first one.

        Ranks, micro-batches and accumulation count by their product, the size of a step.
        """
        names = (
            "model",
            "stage",
            "learning_rate",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "drop_embedding",
            "snr_gamma",
            "ema_decay",
        )
        names += ("resolution", "preprocess", "seed", "mixed_precision")
        names += ("rank", "alpha") if self.stage == "lora" else ()
        return {name: getattr(self, name) for name in names} | {"step size": self.step_size(ranks)}

    def step_size(self, ranks: int) -> int:
        """Return the number of examples of an optimizer step."""
        return self.batch * self.gradient_accumulation * ranks
