"""Evaluate scripts/finetune.py: fine-tune imvar-emoji on drawings of another vendor, and measure on held-out ones.

    python scripts/evaluate_finetune.py [--out out/evaluate-finetune] [--work out/drawings]

The drawings are Mozilla's (finetune_evaluation/fxemoji.py has their credit and licence), which are downloaded from npm
and rendered, and on which nothing was trained. Each stage runs for 200 steps. The loss of the base checkpoint and of
each result is computed on held-out drawings at the same timesteps and noise; the change is the mean of the differences
of each drawing, with its standard error. LoRA and cross-attention have to lower the loss by more than three standard
errors, otherwise the script fails. The judge's top-5 on variations says whether they show the right thing. OpenMoji is
the control: the same figures on drawings of a vendor that neither model was trained on.

Writes a table (table.md), metrics.json, and grids of variations to OUT, which takes about twenty minutes of one CPU
core. The learning rates were chosen by the loss of validation drawings, which are neither trained on nor held out: of
LoRA among 1e-3 and 3e-3, of cross-attention among 3e-4, 1e-3 and 3e-3; that of the whole UNet was not. Try others by:

    python scripts/evaluate_finetune.py --validation --stages lora --learning-rate 3e-3 --out out/lora-3e-3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from finetune_evaluation.estimates import TIMESTEPS, Estimate, fixed_losses, hits, top5_shares
from finetune_evaluation.fxemoji import FXEMOJI, OPENMOJI, concepts, load_fxemoji, load_openmoji, split
from PIL import Image
from train_emoji import judging
from train_emoji.catalogue import REDUCED, codes
from train_emoji.drawings import Drawings
from train_emoji.grids import grid, save_grid

from imvar import StableDiffusionImageVariationPipeline, __version__

ROOT = Path(__file__).parents[1]
JUDGE = ROOT / "tests" / "emoji" / "judge.safetensors"
MODEL, STEPS, BATCH = "imvar-emoji", 200, 8
RATES = {"lora": "3e-3", "cross-attention": "1e-3", "unet": "3e-4"}
MUST_LEARN = ("lora", "cross-attention")
N_ERRORS = 3  # standard errors
SEEDS = {"held-out": 2, "control": 1}  # variations of each drawing


@dataclass(frozen=True)
class Data:
    """Drawings to train on, to measure on, and those of the control, with the judge's code point of some names."""

    trained: Drawings
    measured: Drawings
    control: Drawings | None
    concepts: dict[str, str]

    def judged(self, drawings: Drawings) -> tuple[torch.Tensor, list[str]]:
        """Return the drawings (n, 3, 64, 64) whose concept the judge was trained on, and their code points."""
        known = [i for i, name in enumerate(drawings.codes) if name in self.concepts]
        return drawings.rgb()[known], [self.concepts[drawings.codes[i]] for i in known]


class Comparison:
    """Measures the base checkpoint, then fine-tuned ones, on the same drawings, timesteps, noise and seeds."""

    def __init__(self, data: Data, judge: Any):
        self.data, self.judge, self.classes = data, judge, codes(REDUCED.concepts)
        self.sets = {"held-out": data.measured} | ({"control": data.control} if data.control else {})
        self.base: dict[str, torch.Tensor] = {}
        self.columns = [data.judged(data.measured)[0]]

    def measure(self, name: str, pipe: Any) -> dict[str, Any]:
        """Return the figures of a model; the first one is the base."""
        pipe.safety_checker = None  # it would black out images to be judged
        pipe.set_progress_bar_config(disable=True)
        row: dict[str, Any] = {"model": name}
        for kind, drawings in self.sets.items():
            losses = fixed_losses(pipe, drawings.rgb())
            base = self.base.setdefault(kind, losses)
            rgb, labels = self.data.judged(drawings)
            shares, images = top5_shares(pipe, self.judge, rgb, labels, self.classes, SEEDS[kind])
            if kind == "held-out":
                self.columns.append(images)
            row[kind] = {
                "loss": asdict(Estimate.of(losses)),
                "change": None if base is losses else asdict(Estimate.of(losses - base)),
                "top-5": asdict(Estimate.of(shares)),
            }
        return row

    def measure_drawings(self) -> dict[str, Any]:
        """Return the judge's top-5 on the drawings themselves."""
        row: dict[str, Any] = {"model": "the drawings themselves"}
        for kind, drawings in self.sets.items():
            row[kind] = {"top-5": asdict(Estimate.of(hits(self.judge, *self.data.judged(drawings), self.classes)))}
        return row


def evaluate(data: Data, out: Path, rates: dict[str, str], steps: int = STEPS) -> dict[str, Any]:
    """Fine-tune and measure each of the stages in `rates`; return all figures, and write grids to `out`."""
    torch.manual_seed(0)
    write_images(out / "images", data.trained)
    comparison = Comparison(data, judging.read(JUDGE))
    rows = [comparison.measure_drawings(), comparison.measure("base", load_result())]
    for stage, rate in rates.items():
        options = ["--checkpoint", MODEL, "--stage", stage, "--steps", str(steps), "--batch", str(BATCH)]
        options += ["--learning-rate", rate]
        started = time.monotonic()
        finetune(out / "images", out / stage, options)
        seconds = time.monotonic() - started
        rows.append(
            comparison.measure(stage, load_result(out / stage)) | {"options": options, "seconds": round(seconds)}
        )
    save_grid(out / "variations.png", torch.stack(comparison.columns, 1).flatten(0, 1), len(comparison.columns) * 3)
    return {"machine": machine(), "drawings": counts(data), "timesteps": TIMESTEPS, "seeds": SEEDS, "rows": rows}


def finetune(images: Path, out: Path, options: Sequence[str]) -> None:
    """Run scripts/finetune.py. Raises `SystemExit` if it fails."""
    command = [sys.executable, str(ROOT / "scripts" / "finetune.py"), str(images), "--out", str(out), *options]
    environment = {"PYTHONPATH": str(ROOT), **os.environ}
    if status := subprocess.run(command, env=environment, check=False).returncode:
        raise SystemExit(f"{' '.join(command)}: expected exit status 0, got {status}")


def load_result(folder: Path | None = None) -> Any:
    """Return the pipeline that a run has exported, as its users load it, or that of the base checkpoint."""
    if folder is not None and (folder / "checkpoint").exists():
        return StableDiffusionImageVariationPipeline.from_pretrained(folder / "checkpoint")
    pipe: Any = StableDiffusionImageVariationPipeline.from_pretrained(MODEL)
    if folder is not None:
        pipe.load_lora_weights(folder)
    return pipe


def write_images(folder: Path, drawings: Drawings) -> None:
    """Write drawings on white as PNG files, named by their codes."""
    folder.mkdir(parents=True)
    for name, image in zip(drawings.codes, drawings.rgb(), strict=True):
        grid(image[None], 1).save(folder / f"{name}.png")


def counts(data: Data) -> dict[str, int]:
    sets = {"trained": data.trained, "held-out": data.measured, "control": data.control}
    return {name: len(drawings) for name, drawings in sets.items() if drawings} | {
        f"{name}, judged": len(data.judged(drawings)[1]) for name, drawings in sets.items() if drawings
    }


def machine() -> dict[str, Any]:
    """Return what the results depend on."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return {
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "imvar": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pillow": Image.__version__,
        "threads": torch.get_num_threads(),
        "drawings": [f"{style.package}@{style.version}" for style in (FXEMOJI, OPENMOJI)],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as a table in Markdown."""
    lines = [
        "| model | loss, held-out | change | in standard errors | top-5 | loss, control | change | top-5 | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        held_out, control = row["held-out"], row.get("control", {})
        change = held_out.get("change")
        cells = [
            row["model"],
            text(held_out.get("loss")),
            text(change, sign="+"),
            f"{change['value'] / change['error']:+.1f}" if change else "",
            text(held_out["top-5"], percent=True),
            text(control.get("loss")),
            text(control.get("change"), sign="+"),
            text(control.get("top-5"), percent=True),
            str(row.get("seconds", "")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def text(estimate: dict[str, float] | None, sign: str = "", percent: bool = False) -> str:
    if estimate is None:
        return ""
    value, error = estimate["value"], estimate["error"]
    return f"{100 * value:.0f} ± {100 * error:.0f} %" if percent else f"{value:{sign}.4f} ± {error:.4f}"


def require_learning(rows: list[dict[str, Any]]) -> None:
    """Raise `SystemExit` for a stage that has not lowered the loss by more than three standard errors."""
    for row in rows:
        change = row["held-out"].get("change")
        if row["model"] in MUST_LEARN and not change["value"] < -N_ERRORS * change["error"]:
            raise SystemExit(
                f"{row['model']}: expected a lower loss by more than {N_ERRORS} standard errors, "
                f"got {text(change, sign='+')}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/evaluate-finetune"), help="a new folder for the results")
    add("--work", type=Path, default=Path("out/drawings"), help="folder of the drawings, which are kept")
    add("--stages", nargs="+", choices=RATES, default=list(RATES))
    add("--learning-rate", help="of all stages (default: one for each)")
    add("--steps", type=int, default=STEPS)
    add("--validation", action="store_true", help="measure on the validation drawings, without the control")
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"{args.out}: expected a folder that does not exist; pass another --out")

    started = time.monotonic()
    trained, validation, held_out = split(load_fxemoji(args.work))
    names = concepts()
    if args.validation:
        data = Data(trained, validation, None, names)
    else:
        control = load_openmoji(args.work)
        every_third = control.take(torch.arange(0, len(control), 3))
        data = Data(trained, held_out, every_third, names | {point: point for point in codes(REDUCED.concepts)})
    rates = {stage: args.learning_rate or RATES[stage] for stage in args.stages}
    result = evaluate(data, args.out, rates, args.steps) | {"seconds": round(time.monotonic() - started)}
    (args.out / "metrics.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (args.out / "table.md").write_text(table(result["rows"]), encoding="utf-8")
    print(table(result["rows"]))
    print(", ".join(f"{name} {value}" for name, value in (result["drawings"] | result["machine"]).items()))
    print(f"{result['seconds']} s")
    require_learning(result["rows"])


if __name__ == "__main__":
    main()
