"""Evaluate a trained imvar-emoji: all metrics of its model card, and image grids.

    python scripts/evaluate_emoji.py [--checkpoint imvar-emoji] [--work out/train-emoji] [--out out/evaluation]

Prints a table and writes it to OUT as metrics.json, with image grids. The judge is a classifier that was trained
independently of the model, with another seed; it is a file of the tests. Drawings that are missing in the work folder
are downloaded and rendered, including OpenMoji's, which nothing was trained on. Takes about ten minutes on two CPU
cores; `--quick` uses an eighth of the images.
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
from train_emoji.grids import save_grid
from train_emoji.measures import Share, accuracy, denoise_from, nearest, spread, variations

from imvar import (
    DDIMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImageVariationPipeline,
    bundled_checkpoint,
)
from imvar.weights.bundled import BUNDLED

JUDGE = Path(__file__).parents[1] / "tests" / "emoji" / "judge.safetensors"
Row = tuple[str, str, str]  # name, value, goal


class Evaluation:
    """Generates images with a pipeline and yields the rows of the table."""

    def __init__(self, pipe: Any, judge: Any, drawings: Drawings, out: Path, share: float):
        self.pipe, self.judge, self.out, self.share = pipe, judge, out, share
        self.checker, pipe.safety_checker = pipe.safety_checker, None  # it would black out images to be judged
        self.drawings = drawings
        trainable = learnable(drawings, REDUCED)
        self.trained = trainable.of(REDUCED.concepts)
        self.held_out = held_out(drawings, REDUCED)
        self.unseen_style = drawings.of(REDUCED.concepts, styles=["openmoji"])
        self.unseen_concepts = drawings.of(REDUCED.unseen, styles=set(trainable.styles.tolist()))
        self.classes, self.all = codes(REDUCED.concepts), codes(REDUCED.concepts + REDUCED.unseen)

    def n(self, cases: int) -> int:
        return max(16, int(cases * self.share))

    def subset(self, drawings: Drawings, n: int) -> Drawings:
        """Return n evenly spaced drawings."""
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
            result = self.judge_images(drawings.rgb(), drawings)
            yield f"judge on real {name}, top-1 / top-5", both(result), "65 % top-1" if "held" in name else ""
        for name, drawings in (("trained drawings", self.trained), ("held-out drawings", self.held_out)):
            output = torch.cat([reconstruct(self.pipe.vae, chunk) for chunk in drawings.rgb().split(64)])
            result = self.judge_images(output, drawings)
            self.ceiling = getattr(self, "ceiling", None) or result
            yield f"judge on reconstructed {name}, top-1 / top-5", both(result), ""
        rgb = self.unseen_concepts.rgb()
        output = torch.cat([reconstruct(self.pipe.vae, chunk) for chunk in rgb.split(64)])
        save_grid(self.out / "reconstructions.png", torch.stack([rgb, output], 1).flatten(0, 1)[:64], 16)
        yield "VAE, PSNR of held-out concepts", f"{float(psnr(output, rgb).mean()):.1f} dB", "25 dB"

    def identities(self) -> Iterator[Row]:
        trained, n = self.subset(self.trained, self.n(256)), self.n(256)
        self.ddim = self.generate("trained", trained, n)
        result = self.judge_images(*self.ddim)
        yield "trained drawings, top-1 / top-5", both(result), "top-1 85 % of the reconstructions'"
        ratio = result.top1.value / max(self.ceiling.top1.value, 1e-9)
        yield "  of the reconstructions' top-1", f"{100 * ratio:.0f} %", "85 %"
        distance = nearest(self.ddim[0], self.trained.rgb())
        yield (
            "  near-copies, under 0.03 of a training drawing",
            str(Share(float((distance < 0.03).float().mean()), n)),
            "",
        )
        output = self.generate("held-out", self.held_out, self.n(300))
        yield "held-out drawings, top-1 / top-5", both(self.judge_images(*output)), "top-5 75 %"
        output = self.generate("unseen-style", self.subset(self.unseen_style, self.n(256)), self.n(256))
        yield "an unseen style, top-1 / top-5", both(self.judge_images(*output)), "top-5 40 %"
        images, labels = self.generate("held-out-concepts", self.subset(self.unseen_concepts, self.n(256)), self.n(256))
        kind = [REDUCED.category(chr(int(code, 16))) for code in self.all]
        with torch.no_grad():
            predicted = self.judge(images, self.all).argmax(1)
        correct = [kind[int(i)] == kind[self.all.index(label)] for i, label in zip(predicted, labels, strict=True)]
        yield "held-out concepts, category of six", str(Share(sum(correct) / len(correct), len(correct))), "50 %"

    def schedulers(self) -> Iterator[Row]:
        default, n = self.pipe.scheduler, self.n(256)
        trained = self.subset(self.trained, n)
        ddim = self.judge_images(*self.ddim)
        for kind, options in ((PNDMScheduler, {"skip_prk_steps": True}), (LMSDiscreteScheduler, {})):  # as published
            self.pipe.scheduler = kind.from_config(default.config, **options)
            name = kind.__name__.removesuffix("Scheduler")
            result = self.judge_images(*self.generate(name, trained, n))
            yield f"{name}, trained drawings, top-1 / top-5", both(result), "within 5 points of DDIM"
            yield "  minus DDIM's, in points", points(result, ddim), "-5"
        self.pipe.scheduler = default

    def guidance(self) -> Iterator[Row]:
        inputs = self.n(32)
        drawings = self.subset(self.held_out, inputs)
        for scale in (1.0, 3.0, 7.5):
            images, labels = self.generate(f"guidance-{scale:g}", drawings, 4 * inputs, guidance=scale)
            within, between, smallest = spread(self.judge, images, inputs)
            yield (
                f"guidance {scale:g}, held-out drawings, top-1 / top-5",
                both(self.judge_images(images, labels)),
                "rises",
            )
            yield "  diversity over 4 seeds / between inputs", f"{within:.3f} / {between:.3f}", "falls; above 0.2"
            yield "  smallest mean absolute difference of two seeds", f"{smallest:.3f}", "above 0"

    def shuffled(self) -> Iterator[Row]:
        """Accuracy when each image is generated from another drawing's embedding: it should be at chance."""
        n = self.n(128)
        drawings = self.subset(self.trained, n)
        concepts = [self.classes.index(code) for code in drawings.codes]
        shuffled = [(i + n // 2) % n for i in range(n)]
        assert all(concepts[i] != concepts[j] for i, j in enumerate(shuffled))
        images, _, _ = variations(self.pipe, drawings.rgb()[shuffled], list(drawings.codes), n)
        yield (
            "shuffled embeddings, top-1 / top-5",
            both(self.judge_images(images, list(drawings.codes))),
            f"chance, {100 / len(self.classes):.1f} / {500 / len(self.classes):.1f} %",
        )

    @torch.no_grad()
    def starts(self) -> Iterator[Row]:
        drawings = self.subset(self.trained, self.n(128))
        rgb = drawings.rgb()
        embeddings = self.pipe.image_encoder(pixels(rgb)).image_embeds
        for start in (999, 900, 800, 700, 500, 300):
            images = denoise_from(self.pipe, rgb, embeddings, start)
            yield (
                f"denoised from t = {start}, unguided, top-1 / top-5",
                both(self.judge_images(images, drawings)),
                "within 10 points of t = 700" if start == 999 else "",
            )

    def flags(self) -> Iterator[Row]:
        """Share of images that the demonstration safety checker flags: drawings of its concepts, and other drawings."""
        flaggable = self.drawings.of(SAFETY_CONCEPTS.values(), styles=["openmoji"]).rgb()
        for name, rgb in (
            ("drawings of its concepts, unseen style", flaggable),
            ("held-out drawings of other concepts", self.held_out.rgb()),
            ("variations of trained drawings", self.ddim[0]),
        ):
            flagged = (self.checker.scores(pixels(rgb))[1] > 0).any(1)
            yield f"safety checker, flagged of {name}", str(Share(float(flagged.float().mean()), len(rgb))), ""

    def generate(self, name: str, drawings: Drawings, n: int, guidance: float = 3.0) -> tuple[torch.Tensor, list[str]]:
        """Return n variations with their labels, and save them in a grid with their inputs."""
        rgb = drawings.rgb()
        images, labels, indices = variations(self.pipe, rgb, list(drawings.codes), n, guidance=guidance)
        save_grid(self.out / f"{name}.png", torch.stack([rgb[indices], images], 1).flatten(0, 1)[:192], 16)
        return images, labels

    def judge_images(self, images: torch.Tensor, labels: Any) -> Any:
        """Return the judge's accuracy; `labels` are code points, or drawings."""
        return accuracy(self.judge, images, [str(c) for c in getattr(labels, "codes", labels)], self.classes)


def both(result: Any) -> str:
    return f"{result.top1} / {result.top5}"


def points(result: Any, baseline: Any) -> str:
    pairs = (result.top1, baseline.top1), (result.top5, baseline.top5)
    return " / ".join(f"{100 * (new.value - old.value):+.1f}" for new, old in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default="imvar-emoji", metavar="NAME|FOLDER")
    add("--work", type=Path, default=Path("out/train-emoji"), help="folder of the drawings")
    add("--judge", type=Path, default=JUDGE, help="the judge (default: that of the tests)")
    add("--out", type=Path, default=Path("out/evaluation"))
    add("--write", action="store_true", help="also write the table into the checkpoint folder and its model card")
    add("--quick", action="store_true", help="use an eighth of the images")
    args = parser.parse_args()

    pipe: Any = StableDiffusionImageVariationPipeline.from_pretrained(args.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    evaluation = Evaluation(pipe, judging.read(args.judge), load(args.work), args.out, 0.125 if args.quick else 1.0)
    args.out.mkdir(parents=True, exist_ok=True)
    table, started = [("what", "measured", "goal"), ("---", "---", "---")], time.monotonic()
    for row in evaluation.rows():
        table.append(row)
        print(f"{row[0]:58} {row[1]:30} {row[2]}", flush=True)
    print(f"{time.monotonic() - started:.0f} s")
    write(args.out, table)
    if args.write:
        write(bundled_checkpoint() if args.checkpoint in BUNDLED else Path(args.checkpoint), table)


def write(folder: Path, table: list[Row]) -> None:
    """Write the table as metrics.json, and into the model card, if there is one, between its two markers."""
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
