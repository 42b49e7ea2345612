"""Write a checkpoint in an original single-file layout with seeded random weights, from the tensor lists alone.

    python tests/support/original_checkpoint.py FILE --layout full|ema_only|late|v2 [--seed 0] [--tiny]

full       after training, 8.1 GB: raw and averaged weights, CLIP with its text tower, Lightning's training state;
           with --optimizer also both moments of AdamW, 15 GB
ema_only   without raw weights and training state, 4.7 GB
late       by later training code, 8.6 GB: like `full`, but CLIP in float32 and without most of its text tower
v2         converted from diffusers' layout, 5.0 GB: raw weights, CLIP with transformers' names; --flat does not nest it

Writing takes twice the size of FILE on disk, and little memory. No model code is used.
A tensor has the same values in every layout that contains it in the same precision.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.support.published_checkpoint import PUBLISHED, draw
from tests.support.tiny_sizes import is_in_tiny, tiny_shape

LAYOUTS = ("full", "ema_only", "late", "v2")
PARTS = {  # by prefix, the part whose sizes a tensor has; the first match counts, and schedule tables have none
    "model.": "unet",
    "model_ema.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.model.visual.": "image_encoder",
    "cond_stage_model.model.": "text",
    "cond_stage_model.transformer.": "image_encoder",
}
EXACT_VALUES = {"model_ema.decay": 0.9999, "model_ema.num_updates": 87000, "cond_stage_model.model.logit_scale": 4.6052}
NAMES_OF_2022 = {
    f"c{__name__}\n": "cpytorch_lightning.callbacks.model_checkpoint\n",
    "cnumpy._core.multiarray\n": "cnumpy.core.multiarray\n",
}
Place = Callable[[Tensor], Tensor]


class Row(NamedTuple):
    """A tensor of an original file, the operation that converts it, and its `targets` as part/name."""

    name: str
    shape: list[int]
    dtype: torch.dtype
    op: str
    targets: list[str]


def original_keys(layout: str, tiny: bool = False) -> list[Row]:
    """Return the tensors of a layout in the order of the file."""
    text = "".join((PUBLISHED / "keys" / f"{name}.txt").read_text() for name in ("original", "original_v2"))
    rows, op, dtypes = [], "", {}
    for line in text.splitlines():
        if line.startswith("#"):
            _, op, *pairs = line.split()
            dtypes = dict(pair.split(":") for pair in pairs)
            continue
        name, sizes, targets = line.split("\t")
        shape = json.loads(sizes)
        if layout not in dtypes or (tiny and not is_in_tiny(name)):
            continue
        part = next((part for prefix, part in PARTS.items() if name.startswith(prefix)), None)
        if tiny and part:
            shape = tiny_shape(part, shape)
        rows.append(Row(name, shape, getattr(torch, dtypes[layout]), op, [] if targets == "-" else targets.split(";")))
    return rows


# Content


class ModelCheckpoint:
    """Stands for Lightning's class, which a full file refers to."""


def on_disk(tensor: Tensor, folder: Path) -> Tensor:
    """Return a copy that is mapped from an unnamed file, so that it takes no memory."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        room = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return room.view(tensor.shape).copy_(tensor)


def original_tensors(layout: str, tiny: bool = False, seed: int = 0, place: Place = torch.clone) -> dict[str, Tensor]:
    """Return the weights of a layout; `place` copies each to where it is stored."""
    generator, tensors = torch.Generator(), OrderedDict()
    for row in original_keys(layout, tiny):
        generator.manual_seed(zlib.crc32(row.name.encode(), seed))
        if row.name in EXACT_VALUES:
            tensors[row.name] = torch.tensor(EXACT_VALUES[row.name], dtype=row.dtype)
        else:
            tensors[row.name] = place(draw("".join(row.targets) or row.name, row.shape, row.dtype, generator))
    return tensors


def moments(tensors: dict[str, Tensor], seed: int = 0, place: Place = torch.clone) -> dict[int, dict[str, Any]]:
    """Return the state of AdamW for the raw weights after training."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in tensors.items():
        if name.startswith("model."):
            gradient = draw("", list(tensor.shape), tensor.dtype, generator)
            state[len(state)] = {"step": 87000, "exp_avg": place(gradient), "exp_avg_sq": place(gradient.square())}
    return state


def lightning(tensors: dict[str, Tensor], optimizer: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Return the weights within the training state of Lightning 1.4."""
    tensors._metadata = OrderedDict({"": {"version": 1}})  # as in every state dict of a module
    group = {
        "lr": 1e-4,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.01,
        "amsgrad": False,
        "initial_lr": 1e-4,
        "params": list(range(sum(name.startswith("model.") for name in tensors))),
    }
    best = {
        "monitor": "val/loss_simple_ema",
        "best_model_score": np.float64(0.1366),
        "best_model_path": "last.ckpt",
        "current_score": np.float64(0.1366),
        "dirpath": "checkpoints",
    }
    return {
        "epoch": 56,
        "global_step": 87000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": tensors,
        "callbacks": {ModelCheckpoint: best},
        "optimizer_states": [{"state": optimizer, "param_groups": [group]}],
        "lr_schedulers": [
            {
                "base_lrs": [1e-4],
                "last_epoch": 87000,
                "_step_count": 87001,
                "verbose": False,
                "_get_lr_called_within_step": False,
                "_last_lr": [np.float64(1e-4)],
                "lr_lambdas": [{}],
            }
        ],
    }


def original(
    layout: str,
    tiny: bool = True,
    seed: int = 0,
    optimizer: bool = False,
    flat: bool = False,
    place: Place = torch.clone,
) -> dict[str, Any]:
    """Return the content of a file of this layout."""
    tensors = original_tensors(layout, tiny, seed, place)
    if layout in ("full", "late"):
        return lightning(tensors, moments(tensors, seed, place) if optimizer else {})
    return dict(tensors) if flat else {"state_dict": dict(tensors)}


# Writing


class Pickle2022:
    """A pickle module that writes the class names of 2022: protocol 2 has them as lines of text."""

    class Pickler(pickle.Pickler):
        def __init__(self, file: io.BytesIO, protocol: int) -> None:
            self.file, self.text = file, io.BytesIO()
            super().__init__(self.text, protocol)

        def dump(self, content: Any) -> None:
            super().dump(content)
            text = self.text.getvalue()
            for now, then in NAMES_OF_2022.items():
                text = text.replace(now.encode(), then.encode())
            self.file.write(text)


def write(file: Path, content: dict[str, Any]) -> None:
    """Write the content to a file as PyTorch of 2022."""
    torch.save(content, file, pickle_module=Pickle2022)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="shrink every part to about a hundredth")
    parser.add_argument("--optimizer", action="store_true", help="with AdamW's moments (full, late)")
    parser.add_argument("--flat", action="store_true", help="without a state_dict around the tensors (ema_only, v2)")
    args = parser.parse_args()
    place = partial(on_disk, folder=args.file.parent)
    write(args.file, original(args.layout, args.tiny, args.seed, args.optimizer, args.flat, place))
    size = "tiny" if args.tiny else "at full size"
    print(f"{args.file}: the original layout {args.layout}, {size}, with random weights, seed {args.seed}")


if __name__ == "__main__":
    main()
