"""Draw how fast each sampler converges: the distance to a converged image over the number of steps, on imvar-emoji.

    python scripts/sampler_figure.py [--out out/samplers] [-n 6] [--steps 5 7 10 15 20 30 50] [--spacing trailing]

The reference is DPM-Solver++(2M) with 400 steps. Distances are mean absolute differences of pixels in levels of 255,
averaged over n bundled examples, at guidance 3, from the same noise. Samplers that add noise in each step (dashed)
converge to other images, so their distance stays; Karras sigmas are dotted. Prints a Markdown table and writes
OUT/samplers.svg. A run that was stopped continues with what is in OUT.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imvar import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImageVariationPipeline,
    bundled_examples,
    load_image,
)

KARRAS: dict[str, Any] = {"use_karras_sigmas": True}
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DDIM": (DDIMScheduler, {}),
    "PNDM": (PNDMScheduler, {"skip_prk_steps": True}),
    "LMS": (LMSDiscreteScheduler, {}),
    "LMS, Karras": (LMSDiscreteScheduler, KARRAS),
    "Euler": (EulerDiscreteScheduler, {}),
    "Euler, Karras": (EulerDiscreteScheduler, KARRAS),
    "DPM++ 2M": (DPMSolverMultistepScheduler, {}),
    "DPM++ 2M, Karras": (DPMSolverMultistepScheduler, KARRAS),
    "DPM++ 2M SDE": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "Euler ancestral": (EulerAncestralDiscreteScheduler, {}),
    "DDPM": (DDPMScheduler, {"clip_sample": False}),
}
STOCHASTIC = ("DPM++ 2M SDE", "Euler ancestral", "DDPM")
REFERENCE = "DPM++ 2M"
Distances = Mapping[str, Mapping[str, float]]  # by sampler and number of steps


def images_of(pipe: Any, config: Any, drawings: list[Any], sampler: str, steps: int) -> np.ndarray:
    """Return a variation of each drawing, (n, h, w, 3) in [0, 1]; variation k has the seed k."""
    kind, options = SAMPLERS[sampler]
    pipe.scheduler = kind.from_config(config, **options)
    return pipe(drawings, num_inference_steps=steps, guidance_scale=3, seed=0, output_type="np").images


def table(distances: Distances, steps: Sequence[int]) -> str:
    """Return the distances as a Markdown table."""
    lines = ["| sampler | " + " | ".join(map(str, steps)) + " |", "|---" * (len(steps) + 1) + "|"]
    for name, values in distances.items():
        lines.append(f"| {name} | " + " | ".join(f"{values[str(n)]:.2f}" for n in steps) + " |")
    return "\n".join(lines)


# The figure

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 440, 56, 190, 16, 44
BLUE, RED, GREEN, YELLOW, PURPLE, GREY = "#4477aa", "#ee6677", "#228833", "#b8a035", "#aa3377", "#777777"
COLOURS = dict(
    zip(SAMPLERS, [BLUE, RED, GREEN, GREEN, YELLOW, YELLOW, PURPLE, PURPLE, PURPLE, YELLOW, GREY], strict=True)
)
PAPER, INK, GRID = "#faf9f6", "#2b2a28", "#dddad2"


def figure(distances: Distances, steps: Sequence[int]) -> str:
    """Return an SVG of the distances over the steps, both on logarithmic axes: one line per sampler."""
    values = [value for by_steps in distances.values() for value in by_steps.values()]
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if min(values) / 2 < tick < 2 * max(values)]
    low, high = min(values) / 1.1, max(values) * 1.1

    def x(n: float) -> float:
        share = math.log(n / steps[0]) / math.log(steps[-1] / steps[0]) if len(steps) > 1 else 0.5
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(distance: float) -> float:
        return round(TOP + math.log(high / distance) / math.log(high / low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        ' font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>',
    ]
    for tick in (tick for tick in ticks if low <= tick <= high):
        parts.append(f'<path d="M{LEFT} {y(tick)}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        parts.append(text(LEFT - 8, y(tick) + 4, f"{tick:g}", "end"))
    parts += [text(x(n), HEIGHT - BOTTOM + 20, str(n), "middle") for n in steps]
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "steps", "middle"))
    parts.append(f'<g transform="rotate(-90)">{text(-HEIGHT / 2, 14, "distance, in levels of 255", "middle")}</g>')
    labels = sorted(distances, key=lambda name: -distances[name][str(steps[-1])])
    level = float(TOP)
    for name in labels:
        last = distances[name][str(steps[-1])]
        points = " ".join(f"{x(n)},{y(distances[name][str(n)])}" for n in steps)
        colour = COLOURS[name]
        dashes = ' stroke-dasharray="5 4"' if name in STOCHASTIC else ' stroke-dasharray="1 3"' * ("Karras" in name)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        level = max(level + 16, y(last) + 4)  # labels do not overlap
        parts.append(text(WIDTH - RIGHT + 10, level, f"{name}, {last:.2f}", fill=colour))
    return "\n".join([*parts, "</svg>\n"])


def text(x: float, y: float, content: str, anchor: str = "start", fill: str = INK) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{fill}">{content}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/samplers"))
    parser.add_argument("-n", type=int, default=6, help="drawings (default: 6)")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 7, 10, 15, 20, 30, 50])
    parser.add_argument("--spacing", choices=["trailing", "leading", "linspace"], default="trailing")
    parser.add_argument("--reference-steps", type=int, default=400)
    args = parser.parse_args()
    pipe: Any = StableDiffusionImageVariationPipeline.from_pretrained(
        "imvar-emoji", safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    config = dict(pipe.scheduler.config) | {"timestep_spacing": args.spacing}
    drawings = [load_image(path) for path in bundled_examples().values()][: args.n]
    args.out.mkdir(parents=True, exist_ok=True)
    reference_file, file = args.out / "reference.npy", args.out / "distances.json"
    if not reference_file.exists():
        np.save(reference_file, images_of(pipe, config, drawings, REFERENCE, args.reference_steps))
    reference = np.load(reference_file)
    distances = json.loads(file.read_text()) if file.exists() else {}
    for name in SAMPLERS:
        for steps in args.steps:
            if str(steps) not in distances.setdefault(name, {}):
                images = images_of(pipe, config, drawings, name, steps)
                distances[name][str(steps)] = 255 * float(np.abs(images - reference).mean())
                file.write_text(json.dumps(distances, indent=2))
    distances = {name: distances[name] for name in SAMPLERS}
    (args.out / "samplers.svg").write_text(figure(distances, args.steps), encoding="utf-8")
    print(table(distances, args.steps))


if __name__ == "__main__":
    main()
