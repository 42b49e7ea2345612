"""Plan the memory of fine-tuning: the largest micro-batches for cards of 24, 40 and 80 GB, without a GPU.

    python scripts/finetuning/memory_plan.py [--checkpoint published] [--stage lora] [--gradient-accumulation 2] ...

Weights, gradients, optimizer states and averages are counted; activations and temporary tensors are measured on a
model without data (see memory_trace.py). Neither the CUDA context nor the workspaces of kernels nor what the allocator
leaves unused can be measured so; the plan has a margin for them.
"""

from __future__ import annotations

import argparse
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

if not __package__:  # as a program
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from finetuning.memory_trace import AllocationTrace, Footprint, Measurement, autocast_as_on_cuda, footprint
from finetuning.settings import STAGES
from finetuning.trainable import choose_parameters
from imvar import AutoencoderKL, CLIPVisionModelWithProjection, UNet2DConditionModel
from imvar.weights.pretrained import SkipInit
from imvar.weights.published_config import PUBLISHED_CONFIGS

DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
GIB = 2**30
CARDS = {"24 GB": 22.0, "40 GB": 39.4, "80 GB": 79.1}  # GiB of an L4 or A10G, an A100 and an H100 that programs see
CONTEXT = GIB // 2  # bytes of the CUDA context and the loaded kernels
WORKSPACES = GIB // 2  # bytes of the workspaces of cuDNN and cuBLAS
UNUSED = 0.05  # of activations and temporary tensors: what rounding and fragmentation add
FLOAT32 = 4  # bytes
MAX_BATCH = 1024
ENOUGH = 4  # samples of a micro-batch from which recomputing activations is not worth its time


@dataclass(frozen=True)
class Options:
    """The options of a run that its memory depends on."""

    stage: str = "lora"
    resolution: int | None = None
    rank: int = 16
    mixed_precision: str = "bf16"
    gradient_checkpointing: bool = False
    accumulates: bool = False  # over two micro-batches or more
    ema: bool = True
    bank: bool = True
    ranks: int = 1
    shard: bool = False


@dataclass(frozen=True)
class Models:
    """The models of a checkpoint, on the meta device."""

    unet: Any
    vae: Any
    image_encoder: Any

    @property
    def factor(self) -> int:
        """How many pixels wide and high a latent is."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_side(self, resolution: int | None) -> int:
        side = self.unet.config.sample_size if resolution is None else resolution // self.factor
        if side < 1 or (resolution is not None and resolution % self.factor):
            raise SystemExit(f"resolution: expected a multiple of {self.factor}, got {resolution}")
        return side


def allocate(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the weights of a model on the meta device by those of the current FakeTensorMode, on the CPU."""
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = torch.empty(old.shape, dtype=dtype, device="cpu")
                module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype, device="cpu")


def build(model: str) -> Models:
    """Return the models of a checkpoint: a folder, a bundled name, one on the hub, or "published" for its sizes."""
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "image_encoder": CLIPVisionModelWithProjection,
    }
    configs: Mapping[str, Any] = PUBLISHED_CONFIGS
    if model != "published":
        configs = {name: part.load_config(model, subfolder=name) for name, part in parts.items()}
    with torch.device("meta"), SkipInit():
        return Models(**{name: part.from_config(configs[name]) for name, part in parts.items()})


def train_once(
    unet: Any, shape: Sequence[int], dtype: torch.dtype | None, accumulates: bool = False, trace: Any = None
) -> Measurement:
    """Run the forward and backward pass of one micro-batch of latents (b, c, h, w) in an `AllocationTrace`.

    The gradients of an earlier micro-batch are there already if it `accumulates`.
    """
    trainable = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter) if accumulates else None
    trace = AllocationTrace() if trace is None else trace
    with trace, autocast_as_on_cuda():
        noisy, noise = torch.zeros(shape), torch.zeros(shape)
        timesteps = torch.zeros(shape[0], dtype=torch.int64)
        context = torch.zeros(shape[0], 1, unet.config.cross_attention_dim)
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            output = unet(noisy, timesteps, context, return_dict=False)[0]
            loss = F.mse_loss(output.float(), noise, reduction="none").mean()
        del output
        forward_end = trace.tick()
        loss.backward()
    gradients = [parameter.grad for parameter in trainable if parameter.grad is not None]
    return Measurement(trace, forward_end, gradients)


def encode_once(models: Models, batch: int, side: int) -> Measurement:
    """Run the frozen models for one micro-batch in an `AllocationTrace`."""
    trace = AllocationTrace()
    with trace, torch.no_grad():
        pixels = torch.zeros(batch, 3, side, side, dtype=torch.float16)
        size = models.image_encoder.config.image_size
        clip_pixels = torch.zeros(batch, 3, size, size, dtype=torch.float16)
        models.vae.encode(pixels)
        models.image_encoder(clip_pixels)
    return Measurement(trace, trace.time, [])


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class Plan:
    """The memory of one rank of a run, in bytes, by item and micro-batch."""

    options: Options
    weights: int
    frozen: int  # the VAE and the image encoder
    trainable: int
    largest_block: int
    training: Footprint
    encoding: Footprint | None

    def items(self, batch: int) -> dict[str, int]:
        """Return the bytes of each item at the peak of a step."""
        options = self.options
        split = options.ranks if options.shard else 1
        activations, gradients = self.training.peak(batch, split)
        if options.accumulates:  # all of them are there from the second micro-batch on, with FSDP unsharded
            gradients = self.trainable
        if self.encoding is not None:
            encoding, before = self.encoding.peak(batch)[0], self.trainable if options.accumulates else 0
            if encoding + before > activations + gradients:
                activations, gradients = encoding, before
        return {
            "weights": -(-self.weights // split),
            "gradients": gradients,
            "optimizer states": 2 * -(-self.trainable // split),
            "moving average": -(-self.trainable // split) if options.ema else 0,
            "buckets of DDP": self.trainable if options.ranks > 1 and not options.shard else 0,
            "gathered blocks of FSDP": 3 * self.largest_block if options.shard else 0,
            "VAE and image encoder": 0 if options.bank else self.frozen,
            "activations": activations,
            "margin": CONTEXT + WORKSPACES + int(UNUSED * activations),
        }

    def total(self, batch: int) -> int:
        return sum(self.items(batch).values())

    def largest_batch(self, size: float) -> int:
        """Return the largest micro-batch that fits into memory of `size` bytes, 0 for none."""
        return bisect_right(range(1, MAX_BATCH + 1), size, key=self.total)

    def flags(self, batch: int) -> str:
        """Return the options of `scripts/finetune.py` for this plan."""
        options = self.options
        words = [f"--stage {options.stage} --batch {batch} --mixed-precision {options.mixed_precision}"]
        words += ["--gradient-checkpointing"] * options.gradient_checkpointing + ["--no-ema"] * (not options.ema)
        words += [f"--shard, on {options.ranks} processes"] * options.shard
        return " ".join(words)


def make_plan(checkpoint: str, options: Options) -> Plan:
    """Measure a stage of fine-tuning a model."""
    models = build(checkpoint)
    unet, side = models.unet, models.latent_side(options.resolution)
    dtype = DTYPES[options.mixed_precision]
    with torch.device("meta"), SkipInit():
        choose_parameters(unet.train(), options.stage, options.rank)
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()

    def train(batch: int) -> Measurement:
        return train_once(unet, (batch, unet.config.in_channels, side, side), dtype, options.accumulates)

    def encode(batch: int) -> Measurement:
        return encode_once(models, batch, side * models.factor)

    with FakeTensorMode():
        allocate(unet, torch.float32)
        for frozen in (models.vae, models.image_encoder):
            allocate(frozen.requires_grad_(False), torch.float16)
        training = footprint(train)
        encoding = None if options.bank else footprint(encode)
    blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    return Plan(
        options,
        bytes_of(unet.parameters()),
        bytes_of((*models.vae.parameters(), *models.image_encoder.parameters())),
        bytes_of(parameter for parameter in unet.parameters() if parameter.requires_grad),
        max(bytes_of(block.parameters()) for block in blocks),
        training,
        encoding,
    )


def recommend(plans: Sequence[Plan], size: float) -> str:
    """Return the options for memory of `size` bytes, given the plans of a stage without and with checkpointing.

    Recomputing activations takes time, and so does exchanging weights, so the first of these that fits is recommended:
    nothing, checkpointing, no moving average, 2, 4 or 8 ranks that share the states.
    """
    plain, checkpointed = plans
    if plain.largest_batch(size) >= min(ENOUGH, checkpointed.largest_batch(size)) > 0:
        return plain.flags(plain.largest_batch(size))
    changes: list[dict[str, Any]] = [{}, {"ema": False}, *({"ranks": n, "shard": True} for n in (2, 4, 8))]
    for change in changes:
        plan = replace(checkpointed, options=replace(checkpointed.options, **change))
        if batch := plan.largest_batch(size):
            return plan.flags(batch)
    return "does not fit"


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align the columns of rows, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def report(plans: Sequence[Plan], batch: int) -> str:
    """Return the tables of plans: items for one micro-batch, and what fits on each card."""
    names = [plan.options.stage + ", checkpointing" * plan.options.gradient_checkpointing for plan in plans]
    items = [plan.items(batch) for plan in plans]
    rows = [["stage", *items[0], "total", "saved", "per sample"]]
    for name, plan, sizes in zip(names, plans, items, strict=True):
        saved, more = plan.training.saved(batch), plan.total(batch + 1) - plan.total(batch)
        rows.append([name, *map(gib, (*sizes.values(), plan.total(batch), saved, more))])
    used = [i for i in range(len(rows[0])) if not all(row[i] == "0.00" for row in rows[1:])]
    out = [f"GiB for a micro-batch of {batch}, at the peak:", table([[row[i] for i in used] for row in rows]), ""]
    rows = [["largest micro-batch, and GiB for it", *CARDS]]
    for name, plan in zip(names, plans, strict=True):
        fits = [plan.largest_batch(size * GIB) for size in CARDS.values()]
        rows.append([name, *(f"{n}, {gib(plan.total(n))}" if n else "none" for n in fits)])
    out += [table(rows), "", "Recommended:"]
    for card, size in CARDS.items():
        for pair in zip(plans[::2], plans[1::2], strict=True):
            out.append(f"{card}: {recommend(pair, size * GIB)}")
    return "\n".join(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="published", help='a name or folder, or "published" for its sizes')
    parser.add_argument("--stage", choices=STAGES, action="append", help="default: all")
    parser.add_argument("--resolution", type=int, help="pixels; default: that of the checkpoint")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters of stage lora")
    parser.add_argument("--mixed-precision", choices=DTYPES, default="bf16")
    parser.add_argument("--batch", type=int, default=1, help="the micro-batch of the table of items")
    parser.add_argument("--gradient-accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--ranks", type=int, default=1, help="processes, each with a GPU")
    parser.add_argument("--shard", action="store_true", help="share weights, gradients and states by FSDP")
    parser.add_argument("--no-ema", dest="ema", action="store_false", help="without a moving average")
    parser.add_argument("--no-bank", dest="bank", action="store_false", help="encode images in every step")
    args = parser.parse_args(arguments)
    for name in ("rank", "batch", "gradient_accumulation", "ranks"):
        if getattr(args, name) < 1:
            parser.error(f"{name}: expected an integer from 1, got {getattr(args, name)}")
    fields = ("resolution", "rank", "mixed_precision", "ema", "bank", "ranks", "shard")
    options = Options(accumulates=args.gradient_accumulation > 1, **{name: getattr(args, name) for name in fields})
    stages = args.stage or STAGES
    plans = [
        make_plan(args.checkpoint, replace(options, stage=stage, gradient_checkpointing=checkpointing))
        for stage in stages
        for checkpointing in (False, True)
    ]
    print(report(plans, args.batch))


if __name__ == "__main__":
    main()
