"""The bank of a training: its images, encoded once, in files that are mapped into memory.

A file has the images of a part, whose name is a digest of all that determines its content. So a run that was killed
while it encoded continues, and one with more images encodes only those parts that have changed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from finetuning.encoding import Encoder
from finetuning.examples import Example
from finetuning.images import Images
from imvar.atomic.file import atomic_file
from imvar.errors import InputError, invalid

PART = 1024  # images
BATCH = 8  # images that are encoded at once
MIN_FOR_WORKERS = 500  # images, below which processes take longer to start than the images to read
MAX_NAMED = 100  # broken images


@dataclass
class Part:
    """The images of a file of the bank, by their indices."""

    indices: range
    path: Path


class Bank(Dataset):
    """The encoded images in the files of a bank, without those that cannot be read.

    `broken`: the messages of the latter, by their index.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self.tensors: list[dict[str, Tensor]] = []
        self.broken: dict[int, str] = {}
        counts = []
        for path in self.paths:
            if not path.exists():
                raise invalid(InputError, path, "a file of the bank", "none", "use an --out that all ranks share")
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            self.broken |= {int(index): message for index, message in json.loads(metadata["broken"]).items()}
            counts.append(int(metadata["count"]))
        self.ends = list(accumulate(counts, initial=0))[1:]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Example:
        """Return `mean`, `std` (c, h, w) and `embedding` (d,) of an image, in float32."""
        number = range(len(self))[index]
        place = bisect_right(self.ends, number)
        row = number - (self.ends[place - 1] if place else 0)
        return {name: tensor[row].float() for name, tensor in self.load()[place].items()}

    def load(self) -> list[dict[str, Tensor]]:
        """Return the tensors of each file, whose values are read when they are used."""
        if not self.tensors:
            for path in self.paths:
                with safe_open(path, "pt") as file:
                    self.tensors.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return self.tensors

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"tensors": []}  # another process maps the files itself


def open_bank(
    folder: Path, images: Images, encoder: Encoder, accelerator: Any, workers: int = 0, skip_broken: bool = False
) -> Bank:
    """Return the bank of images in a folder, after all ranks have encoded those that are not in it.

    Raises `InputError` if images cannot be read, after all of them are named on standard error, unless `skip_broken`
    leaves them out.
    """
    parts = parts_of(folder, images, encoder)
    missing = [part for part in parts if not part.path.exists()]
    accelerator.wait_for_everyone()  # before the first rank writes one of them
    rank, is_main = accelerator.process_index, accelerator.is_main_process
    write_parts(missing[rank :: accelerator.num_processes], images, encoder, workers, is_main)
    accelerator.wait_for_everyone()
    bank = Bank([part.path for part in parts])
    broken = {images.name(index): message for index, message in bank.broken.items()}  # mirrored ones have one name
    if is_main:
        for message in list(broken.values())[:MAX_NAMED]:
            print(message, file=sys.stderr)
        if len(broken) > MAX_NAMED:
            print(f"and {len(broken) - MAX_NAMED} more", file=sys.stderr)
    if broken and (not skip_broken or not len(bank)):
        hint = "remove them, or pass --skip-broken; the others are encoded and stay so"
        got = f"{len(broken)} of {len(images.places)} that cannot"
        raise invalid(InputError, "images", "images that can be read", got, hint)
    return bank


def parts_of(folder: Path, images: Images, encoder: Encoder) -> list[Part]:
    """Return the parts of the bank of these images, which may not exist yet."""
    shared = repr((encoder.digest, images.resolution, images.preprocess))
    states = images.states()
    parts = []
    for start in range(0, len(states), PART):
        indices = range(start, min(start + PART, len(states)))
        described = "\n".join([shared, str(start), *(states[index] for index in indices)])
        digest = hashlib.sha256(described.encode(errors="surrogateescape")).hexdigest()
        parts.append(Part(indices, folder / f"{digest[:16]}.safetensors"))
    return parts


def write_parts(parts: list[Part], images: Images, encoder: Encoder, workers: int, is_shown: bool) -> None:
    """Encode the images of parts, and write each file when it is complete."""
    from huggingface_hub.utils import tqdm

    batches = [part.indices[i : i + BATCH] for part in parts for i in range(0, len(part.indices), BATCH)]
    count = sum(map(len, batches))
    workers = workers if count >= MIN_FOR_WORKERS else 0
    context = "spawn" if workers else None
    attempts = DataLoader(
        Attempts(images),
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=collate_attempts,
        num_workers=workers,
        multiprocessing_context=context,
    )
    interval = 0.1 if sys.stderr.isatty() else 30.0  # seconds
    bar = tqdm(total=count, desc="bank", unit=" images", disable=not (is_shown and count), mininterval=interval)
    with bar:
        encoded: list[Example] = []
        broken: dict[int, str] = {}
        remaining = iter(parts)
        part = next(remaining, None)
        for batch, (errors, example) in zip(batches, attempts, strict=True):
            broken |= errors
            if example:
                outputs = encoder.encode(example).items()
                encoded.append({name: tensor.to("cpu", encoder.dtypes[name]) for name, tensor in outputs})
            bar.update(len(batch))
            if part is not None and batch[-1] == part.indices[-1]:
                write_part(part, encoded, broken)
                encoded, broken, part = [], {}, next(remaining, None)


def write_part(part: Part, encoded: list[Example], broken: dict[int, str]) -> None:
    """Write the file of a part."""
    tensors = {name: torch.cat([example[name] for example in encoded]) for name in (encoded[0] if encoded else ())}
    metadata = {"count": str(len(part.indices) - len(broken)), "broken": json.dumps(broken)}
    with atomic_file(part.path) as temporary:
        save_file(tensors, temporary, metadata)


class Attempts(Dataset):
    """Images by their index, with the message of the error in place of one that cannot be read."""

    def __init__(self, images: Images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Example | str]:
        try:
            return index, self.images[index]
        except InputError as error:
            return index, str(error)


def collate_attempts(attempts: list[tuple[int, Example | str]]) -> tuple[dict[int, str], Example]:
    """Return the messages of the images that cannot be read, by index, and the batch of the others."""
    readable = [example for _, example in attempts if not isinstance(example, str)]
    errors = {index: message for index, message in attempts if isinstance(message, str)}
    return errors, default_collate(readable) if readable else {}
