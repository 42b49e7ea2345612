"""Memory of a process that loads the pipeline and makes one image, with diffusers and with imvar (Linux)."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import imvar
from benchmark.cases import DTYPES, pipeline_class, run_pipeline, silence
from benchmark.children import in_child
from benchmark.memory import PeakOfPrivateMemory, status
from benchmark.tables import format_gigabytes, markdown_table, reported

HEADER = (
    *("process", "dtype", "private memory, loaded", "peak private memory", "above the loaded weights"),
    "peak resident memory, mapped weights included",
)
SIDES = {  # library, and whether it keeps freed memory
    "diffusers": ("diffusers", False),
    "imvar": ("imvar", False),
    "imvar, freed memory kept, as the command does": ("imvar", True),
}


def make_one_image(folder: Path, library: str, keep_memory: bool, dtype: str, args: argparse.Namespace) -> list[int]:
    """Return the private memory with the pipeline loaded, its peak, and the peak of resident memory, in bytes."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if keep_memory:
        imvar.keep_freed_memory()
    cls = pipeline_class(library)
    if library == "diffusers":
        silence()
    pipe = cls.from_pretrained(folder, torch_dtype=DTYPES[dtype]).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    loaded = status("RssAnon")
    with PeakOfPrivateMemory() as private:
        run_pipeline(pipe, args.size, args.steps, args.batch)
    return [loaded, private.peak, status("VmHWM")]


def memory_table(folder: Path, args: argparse.Namespace) -> str:
    rows = []
    for dtype in args.dtype:
        for name, side in SIDES.items():
            loaded, private, resident = in_child(make_one_image, folder, *side, dtype, args)
            sizes = map(format_gigabytes, (loaded, private, private - loaded, resident))
            rows.append(reported((name, dtype, *sizes)))
    return markdown_table(HEADER, rows)
