"""The training loop, on one rank or many."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetuning.bank import open_bank
from finetuning.encoding import Encoder
from finetuning.examples import Example, Examples, load_examples, micro_batches
from finetuning.images import Images
from finetuning.objective import diffusion_losses
from finetuning.ranks import distribute, gradient_exchange, is_equal_on_all_ranks, start_accelerator
from finetuning.record import start_record
from finetuning.reports import Log, evaluating, sample_grid, save_samples
from finetuning.settings import Settings
from finetuning.state import Run, lock_folder
from finetuning.trainable import MovingAverage, choose_parameters, trainable_parameters, whole
from imvar import DDPMScheduler
from imvar.loading import load_pipeline as load_checkpoint


class Trainer:
    """A fine-tuning run: its models, its data and its place in them."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.accelerator = start_accelerator(
            mixed_precision=settings.mixed_precision or default_precision(settings.cpu),
            cpu=settings.cpu,
            log_with="tensorboard",
            project_dir=settings.out,
        )
        if self.accelerator.is_main_process:
            self.lock = lock_folder(settings.out)
        self.ranks, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.pipe: Any = load_pipeline(settings.checkpoint, settings.revision, self.accelerator.device)
        self.encoder = Encoder(self.pipe)
        self.scheduler = DDPMScheduler.from_config(self.pipe.scheduler.config)
        self.scaling_factor = self.pipe.vae.config.scaling_factor
        factor = self.pipe.vae_scale_factor
        if settings.resolution and settings.resolution % factor:
            raise SystemExit(f"resolution: expected a multiple of {factor} pixels, got {settings.resolution}")
        self.side = settings.resolution or self.pipe.unet.config.sample_size * factor
        self.latent_shape = (self.pipe.unet.config.in_channels, self.side // factor, self.side // factor)
        images = self.find_images(settings.images, settings.random_flip)
        self.examples = self.find_examples(images, shuffle=True)
        self.validation = (
            self.find_examples(self.find_images(settings.validate), shuffle=False) if settings.validate else None
        )
        self.run = self.prepare(images)
        self.resume()

    def find_images(self, inputs: list[str], flip: bool = False) -> Images:
        """Return the images of inputs. Raises `SystemExit` on all ranks if they do not find the same ones."""
        images = Images(inputs, self.settings.out, self.pipe, self.side, self.settings.preprocess, flip)
        if not is_equal_on_all_ranks(self.accelerator, names_of(images)):
            raise SystemExit(f"{inputs[0]}: expected the same images on all ranks; use a folder that all share")
        return images

    def find_examples(self, images: Any, shuffle: bool) -> Examples:
        """Return the examples of images: of a bank of them, or of the images themselves."""
        settings = self.settings
        if settings.bank:
            folder, skip_broken = settings.out / "bank", settings.skip_broken
            images = open_bank(folder, images, self.encoder, self.accelerator, settings.workers, skip_broken)
        timesteps, drop = self.scheduler.config.num_train_timesteps, settings.drop_embedding if shuffle else 0.0
        return Examples(images, self.latent_shape, timesteps, settings.seed, drop, shuffle)

    def prepare(self, images: Images) -> Run:
        """Choose the parameters, and distribute the UNet over the ranks."""
        settings, unet = self.settings, self.pipe.unet
        torch.manual_seed(settings.seed)  # for the adapters
        self.pipe.vae.requires_grad_(False)
        self.pipe.image_encoder.requires_grad_(False)
        choose_parameters(unet, settings.stage, settings.rank, settings.alpha)
        if settings.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.model = distribute(unet.train(), self.accelerator, settings.shard)
        parameters = trainable_parameters(unet)
        optimizer = torch.optim.AdamW(
            parameters.values(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        average = None if settings.ema_decay is None else MovingAverage(parameters, settings.ema_decay)
        digest = hashlib.sha256(repr(names_of(images)).encode(errors="surrogateescape")).hexdigest()
        recipe = settings.recipe(self.ranks) | {
            "mixed_precision": self.accelerator.mixed_precision,
            "images": f"{len(self.examples.images)} with names and sizes of hash {digest[:12]}",
        }
        return Run(unet, parameters, optimizer, average, recipe)

    def resume(self) -> None:
        """Continue from the state of an earlier run. Raises `SystemExit` if it does not fit, or not on all ranks."""
        settings, run = self.settings, self.run
        run.resume(settings.out)
        if run.step > settings.steps:
            raise SystemExit(
                f"{settings.out}: expected a run of up to {settings.steps} steps, got {run.step}; raise --steps"
            )
        if not is_equal_on_all_ranks(self.accelerator, (run.recipe, run.step)):
            raise SystemExit(
                f"{settings.out}: expected the same state on all ranks, got others; use a folder that all share"
            )

    def train(self) -> None:
        """Train from the present step to the last one, with reports and saves on the way."""
        settings, run, is_main = self.settings, self.run, self.accelerator.is_main_process
        log = Log(settings.out, run.step) if is_main else None
        if is_main:
            start_record(settings, len(self.examples.images))
            print(self.describe(), flush=True)
        self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": run.step + 1}})
        numbers = micro_batches(
            run.step, settings.steps, settings.batch, settings.gradient_accumulation, self.rank, self.ranks
        )
        workers = 0 if settings.bank else settings.workers  # starting them takes seconds, and a bank is quick
        is_cuda = self.accelerator.device.type == "cuda"
        batches = load_examples(self.examples, numbers, workers, pin_memory=is_cuda)
        measured: list[Tensor] = []
        started = time.monotonic()
        if run.step == 0:
            self.write_row(log, {}, samples=True)  # of the base
        while run.step < settings.steps:
            measured.append(self.step(batches))
            run.step += 1
            samples, saves = self.is_due(settings.sample_every), self.is_due(settings.save_every)
            if samples or saves or self.is_due(settings.log_every):
                row = self.summary(measured) | {"seconds": time.monotonic() - started}
                measured.clear()
                self.write_row(log, row, samples)
            if saves:
                run.save(settings.out, is_main)
        if log:
            log.draw()
        self.accelerator.end_training()

    def describe(self) -> str:
        """Return a line that says what is trained, on what."""
        count = sum(parameter.numel() for parameter in self.run.parameters.values())
        ranks = f"{self.ranks} processes" if self.ranks > 1 else "1 process"
        size = self.settings.step_size(self.ranks)
        return (
            f"{self.settings.stage}: {count:,} parameters, {len(self.examples.images)} images, "
            f"{size} a step, {ranks} on {self.accelerator.device.type}, step {self.run.step} of {self.settings.steps}"
        )

    def write_row(self, log: Log | None, row: dict[str, float], samples: bool) -> None:
        """Log a row for the present step; with `samples`, make samples and add the loss of the validation images."""
        if samples and (log or self.settings.shard):  # all ranks have a part in the layers of a sharded UNet
            row |= self.report()
        self.accelerator.log(row, self.run.step)
        if log and row:
            log.add({"step": self.run.step} | row)
        if log and samples:
            log.draw()

    def is_due(self, every: int) -> bool:
        """Return whether the present step is the last one or one of every so many."""
        return self.run.step == self.settings.steps or self.run.step % every == 0

    def step(self, batches: Iterator[Example]) -> Tensor:
        """Make one optimizer step and return the mean loss of this rank and the norm of the gradient, (2,)."""
        settings, run = self.settings, self.run
        for group in run.optimizer.param_groups:
            group["lr"] = self.rate(run.step + 1)
        total = torch.zeros((), device=self.accelerator.device)
        for left in reversed(range(settings.gradient_accumulation)):
            with gradient_exchange(self.model, enabled=not left):
                loss = (
                    self.losses(self.model, next(batches), settings.snr_gamma).mean() / settings.gradient_accumulation
                )
                loss.backward()
            total += loss.detach()
        norm = whole(nn.utils.clip_grad_norm_(run.parameters.values(), settings.max_grad_norm))
        run.optimizer.step()
        run.optimizer.zero_grad()
        if run.average is not None:
            run.average.update(run.step + 1)
        return torch.stack([total, norm])

    def summary(self, measured: list[Tensor]) -> dict[str, float]:
        """Return the means of what steps returned, over all ranks. Raises `SystemExit` on all unless they are finite.

        This synchronises with a GPU, so it is for the steps with a log or a save, which are never of a broken run.
        """
        loss, norm = self.accelerator.reduce(torch.stack(measured).mean(0), "mean").tolist()
        if not math.isfinite(loss + norm):
            hint = f"{self.settings.out} has the state of an earlier step; lower --learning-rate"
            got = f"{loss} and {norm} within the {len(measured)} steps to {self.run.step}"
            raise SystemExit(f"loss and norm of its gradient: expected finite numbers, got {got}; {hint}")
        return {"loss": loss, "gradient norm": norm, "rate": self.rate(self.run.step)}

    def losses(self, model: nn.Module, example: Example, snr_gamma: float | None = None) -> Tensor:
        """Return the losses (b,) of a batch of examples."""
        example = {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in example.items()}
        if "pixels" in example:
            example |= self.encoder.encode(example)
        with self.accelerator.autocast():
            return diffusion_losses(model, example, self.scheduler, self.scaling_factor, snr_gamma)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1: linear warm-up, then constant."""
        return self.settings.learning_rate * min(1.0, step / max(1, self.settings.warmup_steps))

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Write samples by the averaged weights, and return their loss for the validation images, at fixed noise."""
        average = self.run.average
        with average.applied() if average else nullcontext(), evaluating(self.run.unet):
            loss = {} if self.validation is None else {"validation loss": self.validation_loss(self.validation)}
            if self.settings.samples:
                self.write_samples()
        return loss

    def validation_loss(self, examples: Examples) -> float:
        count, batch = len(examples.images), self.settings.batch
        ranges = [range(i, min(i + batch, count)) for i in range(0, count, batch)]
        return float(
            torch.cat([self.losses(self.run.unet, example) for example in load_examples(examples, ranges, 0)]).mean()
        )

    def write_samples(self) -> None:
        images = (self.validation or self.examples).images
        shown = [images[i] for i in range(min(self.settings.samples, len(images)))]
        example = torch.utils.data.default_collate(shown)
        grid = sample_grid(self.pipe, self.encoder.encode(example) if "pixels" in example else example)
        if self.accelerator.is_main_process:
            save_samples(grid, self.settings.out, self.run.step, self.accelerator.get_tracker("tensorboard"))


def names_of(images: Images) -> list[tuple[str, int]]:
    """Return the names and sizes of images, which stay when their folder moves."""
    return [(Path(images.name(i)).name, images.size(i)) for i in range(len(images))]


def load_pipeline(checkpoint: str, revision: str | None, device: torch.device) -> Any:
    """Return the pipeline of a checkpoint, the UNet in float32, the frozen models in half precision on a GPU."""
    pipe: Any = load_checkpoint(checkpoint, revision, None, torch.float32)
    pipe.disable_vae_slicing()
    for frozen in (pipe.vae, pipe.image_encoder) if device.type == "cuda" else ():
        frozen.half()
    for module in (pipe.unet, pipe.vae, pipe.image_encoder):
        module.to(device)
    return pipe


def default_precision(cpu: bool) -> str:
    """Return the precision of autocast on this machine, as accelerate names it."""
    return "bf16" if not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
