"""The training loop, on one rank or many."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from finetuning.bank import open_bank
from finetuning.encoding import Encoder
from finetuning.examples import Example, Examples, load_examples, micro_batches
from finetuning.images import Images
from finetuning.objective import diffusion_losses
from finetuning.record import start_record
from finetuning.reports import Log, sample_grid, save_samples
from finetuning.settings import Settings
from finetuning.state import Run
from finetuning.trainable import averaged_weights, choose_parameters, moving_average
from imvar import DDPMScheduler
from imvar.loading import load_pipeline as load_checkpoint


class Trainer:
    """A fine-tuning run: its models, its data and its place in them."""

    def __init__(self, settings: Settings):
        self.settings = settings
        settings.out.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(
            mixed_precision=settings.mixed_precision or default_precision(settings.cpu),
            cpu=settings.cpu,
            log_with="tensorboard",
            project_dir=settings.out,
        )
        self.ranks, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.pipe: Any = load_pipeline(settings.checkpoint, settings.revision, self.accelerator.device)
        self.encoder = Encoder(self.pipe)
        self.scheduler = DDPMScheduler.from_config(self.pipe.scheduler.config)
        self.scaling_factor = self.pipe.vae.config.scaling_factor
        factor = self.pipe.vae_scale_factor
        self.side = settings.resolution or self.pipe.unet.config.sample_size * factor
        self.latent_shape = (self.pipe.unet.config.in_channels, self.side // factor, self.side // factor)
        self.examples = self.find_examples(settings.images, shuffle=True)
        self.validation = self.find_examples(settings.validate, shuffle=False) if settings.validate else None
        self.run = self.prepare()
        self.run.resume(settings.out)

    def find_examples(self, inputs: list[str], shuffle: bool) -> Examples:
        """Return the examples of images: of a bank of them, or of the images themselves."""
        settings = self.settings
        flip = settings.random_flip and shuffle
        images: Any = Images(inputs, settings.out, self.pipe, self.side, settings.preprocess, flip)
        if settings.bank:
            folder, skip_broken = settings.out / "bank", settings.skip_broken
            images = open_bank(folder, images, self.encoder, self.accelerator, settings.workers, skip_broken)
        timesteps, drop = self.scheduler.config.num_train_timesteps, settings.drop_embedding if shuffle else 0.0
        return Examples(images, self.latent_shape, timesteps, settings.seed, drop, shuffle)

    def prepare(self) -> Run:
        """Choose the parameters, and distribute the UNet over the ranks."""
        settings, unet = self.settings, self.pipe.unet
        torch.manual_seed(settings.seed)  # for the adapters
        self.pipe.vae.requires_grad_(False)
        self.pipe.image_encoder.requires_grad_(False)
        choose_parameters(unet, settings.stage, settings.rank, settings.alpha)
        if settings.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()
        if settings.shard:
            for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
                fully_shard(block)
            self.model = fully_shard(unet)
        else:
            self.model = self.accelerator.prepare(unet)
        parameters = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
        optimizer = torch.optim.AdamW(
            parameters.values(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        average = None if settings.ema_decay is None else moving_average(parameters, settings.ema_decay)
        return Run(unet, parameters, optimizer, average, settings.recipe(self.ranks))

    def train(self) -> None:
        """Train from the present step to the last one, with reports and saves on the way."""
        settings, run, is_main = self.settings, self.run, self.accelerator.is_main_process
        log = Log(settings.out, run.step) if is_main else None
        if is_main:
            start_record(settings, len(self.examples.images))
        self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": run.step + 1}})
        numbers = micro_batches(
            run.step, settings.steps, settings.batch, settings.gradient_accumulation, self.rank, self.ranks
        )
        workers = 0 if settings.bank else settings.workers  # starting them takes seconds, and a bank is quick
        batches = load_examples(self.examples, numbers, workers)
        started, losses = time.monotonic(), []
        while run.step < settings.steps:
            losses.append(self.step(batches))
            run.step += 1
            is_last = run.step == settings.steps
            row: dict[str, float] = {}
            if is_last or run.step % settings.log_every == 0:
                loss = self.accelerator.reduce(torch.stack(losses).mean(), "mean")
                row = {
                    "step": run.step,
                    "loss": float(loss),
                    "rate": self.rate(),
                    "seconds": time.monotonic() - started,
                }
                losses = []
            if is_last or run.step % settings.sample_every == 0:
                with averaged_weights(run.parameters, run.average):
                    row |= {"step": run.step} | self.report()
            if log and row:
                log.add(row)
                if is_last or run.step % settings.sample_every == 0:
                    log.draw()
            if row:
                self.accelerator.log({name: value for name, value in row.items() if name != "step"}, run.step)
            if is_last or run.step % settings.save_every == 0:
                run.save(settings.out, is_main)
        self.accelerator.end_training()

    def step(self, batches: Any) -> Tensor:
        """Make one optimizer step and return the mean loss of this rank."""
        settings, run = self.settings, self.run
        for group in run.optimizer.param_groups:
            group["lr"] = self.rate()
        total = torch.zeros((), device=self.accelerator.device)
        for micro_step in range(settings.gradient_accumulation):
            is_last = micro_step == settings.gradient_accumulation - 1
            if settings.shard:
                self.model.set_requires_gradient_sync(is_last)
            with self.accelerator.no_sync(self.model) if not is_last and not settings.shard else torch.enable_grad():
                loss = self.losses(next(batches), settings.snr_gamma).mean() / settings.gradient_accumulation
                self.accelerator.backward(loss)
            total += loss.detach()
        if not bool(total.isfinite()):
            raise SystemExit(f"loss: expected a finite one, got {float(total)} at step {run.step}")
        nn.utils.clip_grad_norm_(run.parameters.values(), settings.max_grad_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
        if run.average is not None:
            run.average.update_parameters(nn.ParameterList(run.parameters.values()))
        return total

    def losses(self, example: Example, snr_gamma: float | None = None) -> Tensor:
        """Return the losses (b,) of a batch of examples."""
        example = {name: tensor.to(self.accelerator.device) for name, tensor in example.items()}
        if "pixels" in example:
            example |= self.encoder.encode(example)
        with self.accelerator.autocast():
            return diffusion_losses(self.model, example, self.scheduler, self.scaling_factor, snr_gamma)

    def rate(self) -> float:
        """Return the learning rate of the present step: linear warm-up, then constant."""
        return self.settings.learning_rate * min(1.0, (self.run.step + 1) / max(1, self.settings.warmup_steps))

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Write a grid of samples, and return the loss of the validation images at fixed noise and timesteps."""
        out = {}
        if self.validation is not None:
            losses = torch.cat(list(self.over(self.validation, self.losses)))
            out["validation loss"] = float(losses.mean())
        shown = [self.examples.images[i] for i in range(min(self.settings.samples, len(self.examples.images)))]
        example = torch.utils.data.default_collate(shown)
        if "pixels" in example:
            example = self.encoder.encode(example)
        grid = sample_grid(self.pipe, example)
        if self.accelerator.is_main_process:
            tracker = self.accelerator.get_tracker("tensorboard")
            save_samples(grid, self.settings.out, self.run.step, tracker)
        return out

    def over(self, examples: Examples, function: Callable[[Example], Tensor]) -> Any:
        """Yield what a function returns for each batch of all examples."""
        count, batch = len(examples.images), self.settings.batch
        ranges = [range(i, min(i + batch, count)) for i in range(0, count, batch)]
        yield from map(function, load_examples(examples, ranges, 0))


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
