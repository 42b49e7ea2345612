"""Measure a trained imvar-emoji and look at it: everything that its model card says of its quality.

    python scripts/evaluate_emoji.py [--checkpoint imvar-emoji] [--work out/train-default] [--out out/evaluation]

Prints a table, writes it to OUT as metrics.json, and grids to look at beside it. The judge is a network
that was trained apart from the model, from another seed; it is a file of the tests. The drawings are fetched and
rendered into the work folder if they are not there, OpenMoji's among them, on which nothing was trained. About ten
minutes on two cores; `--quick` measures an eighth.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from train_emoji import judging
from train_emoji.autoencoder import psnr, reconstruct
from train_emoji.catalogue import REDUCED, SAFETY_CONCEPTS, codes
from train_emoji.drawings import Drawings, held_out, learnable, load
from train_emoji.encoder import pixels
from train_emoji.measures import Share, from_time, identity, nearest, spread, variations
from train_emoji.pictures import save_grid

from imvar import (
    DDIMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImageVariationPipeline,
    bundled_checkpoint,
)
from imvar.weights.bundled import BUNDLED

JUDGE = Path(__file__).parents[1] / "tests" / "emoji" / "judge.safetensors"
Row = tuple[str, str, str]  # what, the figure, the goal


class Evaluation:
    def __init__(self, pipe: Any, judge: Any, drawings: Drawings, out: Path, share: float):
        self.pipe, self.judge, self.out, self.share = pipe, judge, out, share
        self.checker, pipe.safety_checker = pipe.safety_checker, None  # it would make black what is to be judged
        self.drawings = drawings
        known = learnable(drawings, REDUCED)
        self.trained = known.of(REDUCED.concepts)
        self.held_out = held_out(drawings, REDUCED)
        self.unseen_style = drawings.of(REDUCED.concepts, styles=["openmoji"])
        self.unseen_concepts = drawings.of(REDUCED.unseen, styles=set(known.styles.tolist()))
        self.ours, self.all = codes(REDUCED.concepts), codes(REDUCED.concepts + REDUCED.unseen)

    def n(self, cases: int) -> int:
        return max(16, int(cases * self.share))

    def some(self, drawings: Drawings, n: int) -> Drawings:
        """n of them, evenly."""
        return drawings.take(torch.linspace(0, len(drawings) - 1, min(n, len(drawings))).round().long())

    def rows(self) -> Iterator[Row]:
        yield from self.ceilings()
        yield from self.identities()
        yield from self.schedulers()
        yield from self.guidance()
        yield from self.shuffled()
        yield from self.starts()
        yield from self.flags()

    @torch.no_grad()
    def ceilings(self) -> Iterator[Row]:
        for name, drawings in (
            ("trained drawings", self.trained),
            ("held-out drawings", self.held_out),
            ("drawings in an unseen style", self.unseen_style),
        ):
            real = self.judged(drawings.rgb(), drawings)
            yield f"judge on real {name}, top-1 / top-5", both(real), "65 % top-1" if "held" in name else ""
        for name, drawings in (("trained drawings", self.trained), ("held-out drawings", self.held_out)):
            back = torch.cat([reconstruct(self.pipe.vae, part) for part in drawings.rgb().split(64)])
            self.ceiling = getattr(self, "ceiling", None) or self.judged(back, drawings)
            yield f"judge on reconstructed {name}, top-1 / top-5", both(self.judged(back, drawings)), ""
        rgb = self.unseen_concepts.rgb()
        back = torch.cat([reconstruct(self.pipe.vae, part) for part in rgb.split(64)])
        save_grid(self.out / "reconstructions.png", torch.stack([rgb, back], 1).flatten(0, 1)[:64], 16)
        yield "VAE, PSNR of held-out concepts", f"{float(psnr(back, rgb).mean()):.1f} dB", "25 dB"

    def identities(self) -> Iterator[Row]:
        trained, n = self.some(self.trained, self.n(256)), self.n(256)
        self.ddim = self.made("trained", trained, n)
        found = self.judged(*self.ddim)
        yield "trained drawings, top-1 / top-5", both(found), "top-1 85 % of the reconstructions'"
        of = found.top1.value / max(self.ceiling.top1.value, 1e-9)
        yield "  of the reconstructions' top-1", f"{100 * of:.0f} %", "85 %"
        near = nearest(self.ddim[0], self.trained.rgb())
        yield "  near-copies, under 0.03 of a training drawing", str(Share(float((near < 0.03).float().mean()), n)), ""
        made = self.made("held-out", self.held_out, self.n(300))
        yield "held-out drawings, top-1 / top-5", both(self.judged(*made)), "top-5 75 %"
        made = self.made("unseen-style", self.some(self.unseen_style, self.n(256)), self.n(256))
        yield "an unseen style, top-1 / top-5", both(self.judged(*made)), "top-5 40 %"
        made, labels = self.made("held-out-concepts", self.some(self.unseen_concepts, self.n(256)), self.n(256))
        kind = [REDUCED.category(chr(int(code, 16))) for code in self.all]
        with torch.no_grad():
            best = self.judge(made, self.all).argmax(1)
        right = [kind[int(i)] == kind[self.all.index(label)] for i, label in zip(best, labels, strict=True)]
        yield "held-out concepts, category of six", str(Share(sum(right) / len(right), len(right))), "50 %"

    def schedulers(self) -> Iterator[Row]:
        ours, n = self.pipe.scheduler, self.n(256)
        trained = self.some(self.trained, n)
        ddim = self.judged(*self.ddim)
        for kind, told in ((PNDMScheduler, {"skip_prk_steps": True}), (LMSDiscreteScheduler, {})):  # as published
            self.pipe.scheduler = kind.from_config(ours.config, **told)
            name = kind.__name__.removesuffix("Scheduler")
            found = self.judged(*self.made(name, trained, n))
            yield f"{name}, trained drawings, top-1 / top-5", both(found), "within 5 points of DDIM"
            yield "  less DDIM's, in points", points(found, ddim), "-5"
        self.pipe.scheduler = ours

    def guidance(self) -> Iterator[Row]:
        inputs = self.n(32)
        drawings = self.some(self.held_out, inputs)
        for scale in (1.0, 3.0, 7.5):
            made, labels = self.made(f"guidance-{scale:g}", drawings, 4 * inputs, guidance=scale)
            within, between, least = spread(self.judge, made, inputs)
            yield f"guidance {scale:g}, held-out drawings, top-1 / top-5", both(self.judged(made, labels)), "rises"
            yield "  spread over 4 seeds, of that between inputs", f"{within:.3f} / {between:.3f}", "falls; above 0.2"
            yield "  least difference of two seeds, mean absolute", f"{least:.3f}", "above 0"

    def shuffled(self) -> Iterator[Row]:
        """Told another drawing, whatever else stays: how often what was meant comes out."""
        n = self.n(128)
        drawings = self.some(self.trained, n)
        concepts = [self.ours.index(code) for code in drawings.codes]
        moved = [(i + n // 2) % n for i in range(n)]
        assert all(concepts[i] != concepts[j] for i, j in enumerate(moved))
        made, _, _ = variations(self.pipe, drawings.rgb()[moved], list(drawings.codes), n)
        yield (
            "shuffled embeddings, top-1 / top-5",
            both(self.judged(made, list(drawings.codes))),
            f"chance, {100 / len(self.ours):.1f} / {500 / len(self.ours):.1f} %",
        )

    @torch.no_grad()
    def starts(self) -> Iterator[Row]:
        drawings = self.some(self.trained, self.n(128))
        rgb = drawings.rgb()
        told = self.pipe.image_encoder(pixels(rgb)).image_embeds
        for start in (999, 900, 800, 700, 500, 300):
            made = from_time(self.pipe, rgb, told, start)
            yield (
                f"denoised from t = {start}, unguided, top-1 / top-5",
                both(self.judged(made, drawings)),
                "within 10 points of t = 700" if start == 999 else "",
            )

    def flags(self) -> Iterator[Row]:
        """The demonstration of a safety checker: what it should flag, in the unseen style, and what it should not."""
        looked_for = self.drawings.of(SAFETY_CONCEPTS.values(), styles=["openmoji"]).rgb()
        for name, rgb in (
            ("drawings that it looks for, unseen style", looked_for),
            ("held-out drawings of other things", self.held_out.rgb()),
            ("variations of trained drawings", self.ddim[0]),
        ):
            flagged = (self.checker.scores(pixels(rgb))[1] > 0).any(1)
            yield f"safety checker, flagged of {name}", str(Share(float(flagged.float().mean()), len(rgb))), ""

    def made(self, name: str, drawings: Drawings, n: int, guidance: float = 3.0) -> tuple[torch.Tensor, list[str]]:
        rgb = drawings.rgb()
        made, labels, places = variations(self.pipe, rgb, list(drawings.codes), n, guidance=guidance)
        save_grid(self.out / f"{name}.png", torch.stack([rgb[places], made], 1).flatten(0, 1)[:192], 16)
        return made, labels

    def judged(self, made: torch.Tensor, labels: Any) -> Any:
        return identity(self.judge, made, [str(c) for c in getattr(labels, "codes", labels)], self.ours)


def both(found: Any) -> str:
    return f"{found.top1} / {found.top5}"


def points(found: Any, other: Any) -> str:
    pairs = (found.top1, other.top1), (found.top5, other.top5)
    return " / ".join(f"{100 * (one.value - two.value):+.1f}" for one, two in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default="imvar-emoji", metavar="NAME|FOLDER")
    add("--work", type=Path, default=Path("out/train-default"), help="where the drawings are, or will be")
    add("--judge", type=Path, default=JUDGE, help="default: that of the tests")
    add("--out", type=Path, default=Path("out/evaluation"))
    add("--write", action="store_true", help="write the table into the checkpoint's folder and model card as well")
    add("--quick", action="store_true", help="an eighth of the pictures")
    args = parser.parse_args()

    pipe: Any = StableDiffusionImageVariationPipeline.from_pretrained(args.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    evaluation = Evaluation(pipe, judging.read(args.judge), load(args.work), args.out, 0.125 if args.quick else 1.0)
    args.out.mkdir(parents=True, exist_ok=True)
    table, begun = [("what", "measured", "goal"), ("---", "---", "---")], time.monotonic()
    for row in evaluation.rows():
        table.append(row)
        print(f"{row[0]:58} {row[1]:30} {row[2]}", flush=True)
    print(f"{time.monotonic() - begun:.0f} s")
    write(args.out, table)
    if args.write:
        write(bundled_checkpoint() if args.checkpoint in BUNDLED else Path(args.checkpoint), table)


def write(folder: Path, table: list[Row]) -> None:
    """The table as metrics.json, and in a model card that is there, between its two marks."""
    rows = [dict(zip(table[0], row, strict=True)) for row in table[2:]]
    (folder / "metrics.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    card = folder / "README.md"
    if card.exists():
        lines = "".join(f"| {' | '.join(row).strip()} |\n" for row in table)
        text = re.sub(
            r"(?s)(<!-- metrics -->\n).*(<!-- /metrics -->)",
            lambda marks: marks[1] + lines + marks[2],
            card.read_text(encoding="utf-8"),
        )
        card.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
