"""Cost of regions in a guided step: a step with two of them against a plain one, in interleaved pairs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

import imvar
from benchmark.cases import Libraries
from benchmark.tables import markdown_table
from imvar.models.ops import PackedWeights
from imvar.models.regions import RegionLayout
from imvar.runtime.precompute import PrecomputedUNet

PAIRS = 20
HEADER = ("guided step", "plain", "two regions", f"ratio, median of {PAIRS} pairs", "lowest", "highest")


@torch.no_grad()
def regions_table(libraries: Libraries, seconds: Callable[[Callable[[], Any]], float]) -> str:
    """Return a table of the times; `seconds` times a call. Both kinds of step share packed weights."""
    batch, side = libraries.args.batch, libraries.size // 8
    unet = imvar.UNet2DConditionModel.from_pretrained(libraries.folder / "unet", torch_dtype=libraries.dtype)
    unet.to(libraries.device)
    x, embeds = libraries.noise(batch, 4, side, side), libraries.noise(batch, 2, libraries.width, seed=1)
    conditional = torch.cat([embeds, torch.zeros_like(embeds[:, :1])], dim=1)
    context = torch.cat([torch.zeros_like(conditional), conditional])
    left = torch.zeros(side, side)
    left[:, : side // 2] = 1
    regions = RegionLayout(torch.stack([1 - left, left]), [1.0, 1.0], (side, side))

    times = torch.linspace(981, 1, 50, device=libraries.device).long()
    prepare = partial(PrecomputedUNet, unet, times, runner=libraries.runner(), packed=PackedWeights(len(times)))
    steps = [prepare(context[:, :1].contiguous()), prepare(context, regions=regions)]
    for predict in steps * 2:  # packs weights, allocates memory and compiles
        predict(x, 7)
    pairs = []
    for i in range(PAIRS):
        order = (0, 1) if i % 2 else (1, 0)
        taken = {kind: seconds(partial(steps[kind], x, 7)) for kind in order}
        pairs.append((taken[0], taken[1]))
    ratios = sorted(regional / plain for plain, regional in pairs)
    medians = (f"{1000 * median(times):.1f} ms" for times in zip(*pairs, strict=True))
    cells = (f"{batch} x {libraries.size} px", *medians, *(f"{r:.3f}" for r in (median(ratios), ratios[0], ratios[-1])))
    return markdown_table(HEADER, [cells])
