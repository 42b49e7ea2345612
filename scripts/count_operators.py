"""Count the operators that PyTorch dispatches: in a run of imvar-emoji, and in a step of the full-size UNet.

    python scripts/count_operators.py [--images 4] [--steps 20] [--rows 20]

The run varies a bundled drawing under guidance. The step is of both halves of guidance at 64 x 64 latents, on tensors
without data, for which imvar calls PyTorch's kernels rather than its own; beside it is diffusers' if it is installed.
Totals are of all operators, and of those that are not views.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from imvar import StableDiffusionImageVariationPipeline, UNet2DConditionModel, bundled_examples, load_image
from imvar.runtime.precompute import PrecomputedUNet

GUIDANCE = 3.0
WIDTH = 768  # of a token of the context
LATENTS = (1, 4, 64, 64)


@dataclass
class Counts:
    """How often operators were dispatched, by name: those that are views, and the others."""

    views: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)


class OperatorCounter(TorchDispatchMode):
    """Counts operators while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = func.is_view or func is torch.ops.aten._unsafe_view.default
        counter = self.counts.views if is_view else self.counts.others
        if func.namespace != "prim":  # attributes of tensors without data
            counter[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def count_operators(function: Callable[[], Any]) -> Counts:
    """Return how often a call of the function dispatches each operator."""
    with OperatorCounter() as counter:
        function()
    return counter.counts


def count_run(images: int, steps: int) -> Counts:
    """Count the operators of a call of imvar-emoji."""
    pipe = StableDiffusionImageVariationPipeline.from_pretrained("imvar-emoji")
    pipe.set_progress_bar_config(disable=True)
    drawing = load_image(bundled_examples()["fox-noto"])
    options = {"num_images_per_prompt": images, "num_inference_steps": steps, "guidance_scale": GUIDANCE, "seed": 0}
    return count_operators(lambda: pipe(drawing, **options))


def count_step() -> Counts:
    """Count the operators of a guided step of the UNet, after precomputation, as in the loop."""
    with FakeTensorMode():
        times, x, context = torch.ones(2).long(), torch.ones(LATENTS), torch.ones(2, 1, WIDTH)
        unet = PrecomputedUNet(UNet2DConditionModel(cross_attention_dim=WIDTH).eval(), times, context)
        return count_operators(lambda: unet(x, 0))


def count_reference_step() -> Counts:
    """Count the operators of the same step in diffusers. Raises `ImportError` without it."""
    import diffusers

    with FakeTensorMode():
        time, x, context = torch.ones(()).long(), torch.ones(LATENTS), torch.ones(2, 1, WIDTH)
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=WIDTH).eval()
        return count_operators(lambda: unet(torch.cat([x, x]), time, encoder_hidden_states=context))


def print_counts(title: str, counts: Counts, rows: int) -> None:
    both = counts.views + counts.others
    print(f"{title}: {both.total():,} operators, {counts.others.total():,} without views")
    for name, count in both.most_common(rows):
        print(f"{count:8,} {name}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=20, help="names to print, the most frequent first (default: 20)")
    args = parser.parse_args()
    run = f"imvar-emoji, {args.images} images, {args.steps} steps"
    print_counts(run, count_run(args.images, args.steps), args.rows)
    print_counts("a guided step of the full-size UNet, imvar", count_step(), args.rows)
    try:
        print_counts("diffusers", count_reference_step(), args.rows)
    except ImportError:
        print("diffusers is not installed")


if __name__ == "__main__":
    main()
