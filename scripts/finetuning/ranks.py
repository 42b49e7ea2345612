"""A UNet that is trained by many ranks: a copy on each (DDP), or a part of each tensor (FSDP2, arXiv:2304.11277)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(hours=12)  # for a rank that encodes more images than others, or validates alone


def start_accelerator(cpu: bool, **options: Any) -> Accelerator:
    """Return accelerate's view of this rank, on the CPU without CUDA.

    Raises `SystemExit` if its config asks for another kind of training, or if the processes do not find each other.
    """
    cpu = cpu or not torch.cuda.is_available()  # else accelerate makes no group of the processes
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)], **options)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise SystemExit(f"WORLD_SIZE: expected {accelerator.num_processes} processes in a group, got {started}")
    others = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
    if accelerator.distributed_type in others:
        got = accelerator.distributed_type.value
        raise SystemExit(f"accelerate: expected processes with a copy of the model, got {got}; for FSDP2 pass --shard")
    return accelerator


def distribute(unet: Any, accelerator: Accelerator, shard: bool) -> nn.Module:
    """Return the module that computes a training step's output: a wrapper of the UNet, or itself, then in shards."""
    ranks = accelerator.num_processes
    if ranks == 1:
        return unet
    if not shard:
        return DistributedDataParallel(unet, gradient_as_bucket_view=True)
    mesh = init_device_mesh(accelerator.device.type, (ranks,))
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        fully_shard(block, mesh=mesh)
    return fully_shard(unet, mesh=mesh, reshard_after_forward=True)  # else it keeps the averaged weights of a report


@contextmanager
def gradient_exchange(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Average the gradients of a backward pass in the block over all ranks, or add them up on each rank till then."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield


def is_equal_on_all_ranks(accelerator: Accelerator, value: object) -> bool:
    """Return, on all ranks, whether all gave a value of the same `repr`."""
    digest = int.from_bytes(hashlib.sha256(repr(value).encode(errors="surrogateescape")).digest()[:4], "big")
    digests = accelerator.gather(torch.tensor([digest], device=accelerator.device))
    return bool((digests == digest).all())
