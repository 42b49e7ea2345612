"""The checkpoint, device and dtype that the options of a command select."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from . import schedulers
from .choices import CHECKPOINT, EMOJI, REVISION, SCHEDULERS
from .errors import InputError, invalid, short_repr
from .pipeline import StableDiffusionImageVariationPipeline

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_pipeline(
    checkpoint: str, revision: str | None, scheduler: str | None, dtype: torch.dtype
) -> StableDiffusionImageVariationPipeline:
    """Return the pipeline of a checkpoint, with its own scheduler or the named one."""
    if Path(checkpoint).exists() and revision:
        raise invalid(InputError, "--revision", f"none for the local checkpoint {checkpoint}", revision)
    revision = revision or (REVISION if checkpoint == CHECKPOINT else None)
    pipeline_cls = StableDiffusionImageVariationPipeline
    if Path(checkpoint).is_file():  # original files have no safety checker; vary() says so
        pipe = pipeline_cls.from_single_file(checkpoint, dtype=dtype, requires_safety_checker=False)
    else:
        pipe = pipeline_cls.from_pretrained(checkpoint, revision=revision, dtype=dtype)
    if scheduler:
        set_scheduler(pipe, scheduler)
    pipe.enable_vae_slicing()
    return pipe


def set_scheduler(pipe: StableDiffusionImageVariationPipeline, name: str) -> None:
    """Replace the scheduler by the named one, with the config of the present one."""
    class_name, changes = SCHEDULERS[name]
    scheduler_cls = getattr(schedulers, class_name)
    pipe.scheduler = scheduler_cls.from_config(pipe.components["scheduler"].config, **changes)


def is_emoji(checkpoint: str) -> bool:
    """Return whether this names the bundled checkpoint, not a folder or file of the same name."""
    return checkpoint == EMOJI and not Path(checkpoint).exists()


def prefer_one_thread() -> None:
    """Compute with one thread, as the layers of imvar-emoji are too small for two, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def pick_device(name: str) -> torch.device:
    """Return the device of that name after allocating on it; for "auto" the fastest available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without this backend
        expected = "'auto', 'cpu' or another device that this machine and PyTorch have"
        raise invalid(InputError, "--device", expected, short_repr(name)) from error
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of that name; for "auto" half precision if the device supports it natively."""
    if name == "float16" and device.type == "cpu":
        expected = "float32 on a CPU, or bfloat16 if the CPU has instructions for it"
        raise invalid(InputError, "--dtype", expected, "float16, which is about a hundred times slower")
    if name != "auto":
        return getattr(torch, name)
    native = {"cuda": torch.float16, "cpu": torch.bfloat16 if has_bfloat16() else torch.float32}
    return native.get(device.type, torch.float32)


def has_bfloat16() -> bool:
    """Return whether this CPU has bfloat16 instructions, so that bfloat16 is not emulated."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # missing in the oldest supported PyTorch
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
