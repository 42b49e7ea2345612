"""One training loop for every part: a time budget, a moving average of the weights, resuming, a log.

A job says how to draw a loss; everything random in a step comes of the seed and the step's number, so a run that was
stopped goes on with the batches that it would have had. The learning rate falls with the time spent out of the time
planned: planning more time and starting again trains on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imvar import set_attend

SAVE_EVERY = 60.0  # seconds
LOOK_AT_LOSS = 5  # steps


@dataclass
class Job:
    """What to train: `loss(generator)` is the loss of one batch, or (loss, figures for the log)."""

    name: str
    model: nn.Module
    loss: Callable[[torch.Generator], Tensor | tuple[Tensor, dict[str, Tensor]]]
    batch: int
    rate: float
    average: float = 0.999
    decay: float = 0.01
    compiled: Sequence[nn.Module] = ()  # by torch.compile, where there is a GPU
    look: Callable[[nn.Module], dict[str, float]] | None = None
    look_every: float = 240.0  # seconds


def quick_on_cpu(model: nn.Module, device: torch.device) -> None:
    """Attention spelled out, where a CPU computes its gradients twice as fast as those of the fused kernel."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v

    if device.type == "cpu":
        set_attend(model, attend)


@dataclass
class Progress:
    steps: int = 0
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)


class Average:
    """The moving average of a model's weights and buffers, which is what is used and shipped."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = [(self.tensors[name], tensor) for name, tensor in model.state_dict().items()]
        means, tensors = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        torch._foreach_lerp_(means, tensors, 1 - decay)
        for count, now in (pair for pair in pairs if not pair[0].is_floating_point()):
            count.copy_(now)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the averaged weights, in eval mode; afterwards as it was."""
        raw = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.tensors)
        try:
            yield model.eval()
        finally:
            model.load_state_dict(raw)
            model.train()


def train(
    job: Job,
    folder: Path,
    minutes: float,
    seed: int,
    device: torch.device,
    until: float = math.inf,
    begun_with: Mapping[str, Any] | None = None,
    keep: bool = False,
) -> tuple[nn.Module, dict[str, float]]:
    """The job's model with averaged weights, after `minutes` in all runs together, or as far as `until` allows.

    `until` is a time of `time.monotonic()`. What was reached lies in `folder` as NAME.pt, the log as NAME.jsonl.
    `begun_with` is what must not have changed since this stage was begun, unless it is to be kept nevertheless: the
    options, and the steps of the stages that it builds on. Answers the last figures as well.
    """
    begun_with = dict(begun_with or {})
    folder.mkdir(parents=True, exist_ok=True)
    path, model = folder / f"{job.name}.pt", job.model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), job.rate, weight_decay=job.decay, fused=True)
    average, progress = Average(model, job.average), Progress()
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        if saved["begun_with"] != begun_with and not keep:
            raise SystemExit(
                f"{path} was begun with {said(saved['begun_with'])}, and now there is {said(begun_with)}: "
                "delete it to begin this stage again, --keep to go on with it, or give the options and "
                "--minutes of before"
            )
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average.tensors, progress = saved["average"], Progress(**saved["progress"])
    if device.type == "cuda":
        for module in job.compiled:
            module.compile()
    begun, planned = time.monotonic() - progress.seconds, minutes * 60
    saved_at = looked_at = progress.seconds
    while progress.seconds < planned and time.monotonic() < until:
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + progress.steps)
        for group in optimizer.param_groups:
            group["lr"] = job.rate * pace(progress.steps, progress.seconds / planned)
        with torch.autocast(device.type, torch.bfloat16):
            drawn = job.loss(generator)
        loss, figures = drawn if isinstance(drawn, tuple) else (drawn, {})
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, progress.steps)
        if progress.steps % LOOK_AT_LOSS == 0:  # seldom, since a GPU is waited for
            for name, value in {"loss": loss.detach(), **figures}.items():
                progress.figures[name] = float(value) * 0.1 + progress.figures.get(name, float(value)) * 0.9
            if not math.isfinite(progress.figures["loss"]):
                raise SystemExit(f"{job.name}: the loss is not finite at step {progress.steps}; {path} is from before")
        progress.steps, progress.seconds = progress.steps + 1, time.monotonic() - begun
        last = progress.seconds >= planned or time.monotonic() >= until
        if job.look and (last or progress.seconds - looked_at > job.look_every):
            with average.applied(model), torch.no_grad():
                progress.seen = job.look(model)
                report(job, folder, progress, planned, progress.seen)
            looked_at = progress.seconds
        if last or progress.seconds - saved_at > SAVE_EVERY:
            save(path, model, optimizer, average, progress, begun_with)
            report(job, folder, progress, planned)
            saved_at = progress.seconds
    model.load_state_dict(average.tensors)
    return model.eval(), {
        "step": progress.steps,
        "samples": progress.steps * job.batch,
        "seconds": progress.seconds,
        **progress.figures,
        **progress.seen,
    }


def pace(step: int, part: float) -> float:
    """The learning rate as a part of its peak: warmed up over 100 steps, then along half a cosine."""
    return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(part, 1.0))))


def said(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "nothing"


def save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average,
    progress: Progress,
    begun_with: dict[str, Any],
) -> None:
    part = path.with_suffix(".part")
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average.tensors,
            "progress": vars(progress),
            "begun_with": begun_with,
        },
        part,
    )
    part.replace(path)


def report(job: Job, folder: Path, progress: Progress, planned: float, looked: dict[str, float] | None = None) -> None:
    """One line of the log, and on the screen."""
    line = {
        "step": progress.steps,
        "samples": progress.steps * job.batch,
        "seconds": round(progress.seconds, 1),
        **{name: round(value, 4) for name, value in (looked or progress.figures).items()},
    }
    with (folder / f"{job.name}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{job.name} {progress.seconds / planned:4.0%}", *(f"{k} {v}" for k, v in line.items()), flush=True)
