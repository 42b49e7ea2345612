"""The training loop of every component: a time budget, an EMA of the weights, resuming, a log.

A job computes the loss of a batch. Randomness depends on the seed and the step alone, so a resumed run continues with
the same batches. The learning rate decays with the share of the planned time that is used up: to train longer, plan
more time and start again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from imvar import set_attend

SAVE_EVERY = 60.0  # seconds
LOSS_EVERY = 5  # steps


@dataclass
class Job:
    """A model to train. `loss(generator)` returns the loss of one batch, or the loss and metrics to log."""

    name: str
    model: nn.Module
    loss: Callable[[torch.Generator], Tensor | tuple[Tensor, dict[str, Tensor]]]
    batch: int
    rate: float
    average: float = 0.999
    decay: float = 0.01
    compiled: Sequence[nn.Module] = ()  # modules to compile on a GPU
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    evaluate_every: float = 240.0  # seconds


def use_unfused_attention_on_cpu(model: nn.Module, device: torch.device) -> None:
    """Use unfused attention on a CPU, where its gradients are twice as fast as those of the fused kernel."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v

    if device.type == "cpu":
        set_attend(model, attend)


@dataclass
class Progress:
    steps: int = 0
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of weights and buffers, which is what is evaluated and shipped."""

    @torch.no_grad()
    def update(means: list[Tensor], tensors: list[Tensor], updates: Tensor | int) -> None:
        if means[0].is_floating_point():
            torch._foreach_lerp_(means, tensors, 1 - min(decay, (1 + int(updates)) / (10 + int(updates))))
        else:  # counts
            torch._foreach_copy_(means, tensors)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True).eval()  # type: ignore[arg-type]


def train(
    job: Job,
    folder: Path,
    minutes: float,
    seed: int,
    device: torch.device,
    until: float = math.inf,
    dependencies: Mapping[str, Any] | None = None,
    keep: bool = False,
) -> tuple[nn.Module, dict[str, float]]:
    """Train the job's model for `minutes`, summed over all runs, and return it with averaged weights and metrics.

    Stops early at `until`, a value of `time.monotonic()`. The state is in `folder` as NAME.pt, the log as NAME.jsonl.
    `dependencies` are the options and the steps of the stages that this one builds on; if they changed since it was
    started, training stops with an error, unless `keep`.
    """
    dependencies = dict(dependencies or {})
    folder.mkdir(parents=True, exist_ok=True)
    path, model = folder / f"{job.name}.pt", job.model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), job.rate, weight_decay=job.decay, fused=True)
    average, progress = averaged(model, job.average), Progress()
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        if saved["dependencies"] != dependencies and not keep:
            raise SystemExit(
                f"{path}: expected {listing(dependencies)}, got {listing(saved['dependencies'])}; delete it to restart "
                "this stage, pass --keep to resume it, or pass the same options and --minutes as before"
            )
        average.module.load_state_dict(saved["average"])
        progress = Progress(**saved["progress"])
        average.n_averaged.fill_(progress.steps)
        if "optimizer" in saved:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        elif progress.seconds < minutes * 60:
            raise SystemExit(f"{path}: it was stripped, so it cannot be continued; delete it to restart this stage")
    if device.type == "cuda":
        for module in job.compiled:
            module.compile()
    started, planned = time.monotonic() - progress.seconds, minutes * 60
    saved_at = evaluated_at = progress.seconds
    while progress.seconds < planned and time.monotonic() < until:
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + progress.steps)
        for group in optimizer.param_groups:
            group["lr"] = job.rate * schedule(progress.steps, progress.seconds / planned)
        with torch.autocast(device.type, torch.bfloat16):
            output = job.loss(generator)
        loss, figures = output if isinstance(output, tuple) else (output, {})
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        if progress.steps % LOSS_EVERY == 0:  # rarely, as it synchronises with the GPU
            for name, value in {"loss": loss.detach(), **figures}.items():
                progress.figures[name] = float(value) * 0.1 + progress.figures.get(name, float(value)) * 0.9
            if not math.isfinite(progress.figures["loss"]):
                raise SystemExit(
                    f"{job.name}: the loss is not finite at step {progress.steps}; {path} is an earlier state"
                )
        progress.steps, progress.seconds = progress.steps + 1, time.monotonic() - started
        last = progress.seconds >= planned or time.monotonic() >= until
        if job.evaluate and (last or progress.seconds - evaluated_at > job.evaluate_every):
            with torch.no_grad():
                progress.metrics = job.evaluate(average.module)
            report(job, folder, progress, planned, progress.metrics)
            evaluated_at = progress.seconds
        if last or progress.seconds - saved_at > SAVE_EVERY:
            save(path, model, optimizer, average, progress, dependencies)
            report(job, folder, progress, planned)
            saved_at = progress.seconds
    model.load_state_dict(average.module.state_dict())
    return model.eval(), {
        "step": progress.steps,
        "samples": progress.steps * job.batch,
        "seconds": progress.seconds,
        **progress.figures,
        **progress.metrics,
    }


def schedule(step: int, progress: float) -> float:
    """Return the learning rate relative to its peak: linear warm-up over 100 steps, then cosine decay."""
    return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def listing(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "nothing"


def save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel,
    progress: Progress,
    dependencies: dict[str, Any],
) -> None:
    partial = path.with_suffix(".part")
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average.module.state_dict(),
            "progress": vars(progress),
            "dependencies": dependencies,
        },
        partial,
    )
    partial.replace(path)


def strip(path: Path) -> None:
    """Remove from a saved state what only further training needs, three quarters of it."""
    saved, partial = torch.load(path, map_location="cpu", weights_only=True), path.with_suffix(".part")
    torch.save({name: value for name, value in saved.items() if name not in ("model", "optimizer")}, partial)
    partial.replace(path)


def report(job: Job, folder: Path, progress: Progress, planned: float, metrics: dict[str, float] | None = None) -> None:
    """Append one line to the log and print it."""
    line = {
        "step": progress.steps,
        "samples": progress.steps * job.batch,
        "seconds": round(progress.seconds, 1),
        **{name: round(value, 4) for name, value in (metrics or progress.figures).items()},
    }
    with (folder / f"{job.name}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{job.name} {progress.seconds / planned:4.0%}", *(f"{k} {v}" for k, v in line.items()), flush=True)
