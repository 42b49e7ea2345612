"""Train imvar-emoji, the small bundled checkpoint, from npm packages to a checkpoint folder in one command.

    python scripts/train_emoji [--work out/train-emoji] [--budget MINUTES] [--scope reduced|full]

Requires `npm`, which downloads 24 MB of drawings, and `pip install .[train]`. All outputs are in the work folder: a run
that was stopped, or that used up its --budget (exit status 1), resumes when started again. Sample grids (*.png) and
logs (*.jsonl) are written during training; the checkpoint is WORK/imvar-emoji.

The stages: teacher, encoder (which must classify half of the held-out drawings before training continues), vae, unet,
safety, judge. On a CPU the default minutes suit two cores; `--minutes unet=120` changes them. A stage that was
trained for fewer minutes than planned is continued, and stages that build on it are restarted, or continued with
--keep.

On a GPU machine without a network: render the drawings elsewhere by `--only drawings`, and copy WORK/drawings-*.npz and
WORK/iconify-json-noto-1*.tgz there, 29 MB. A run may end later than its --budget, since compiling, the bank of latents
and the evaluation of a stage are not interrupted. The next run needs these files and WORK/*.pt, without bank-*.pt: 136
MB after all stages. `--strip STAGE` makes the file of a stage that is complete a quarter of its size. Only the last
step, which writes the checkpoint folder, needs resvg_py and the archives of noto-v1 and fluent-emoji-flat too.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]

from imvar import AutoencoderKL, CLIPVisionModelWithProjection, StableDiffusionSafetyChecker
from train_emoji import (
    autoencoder,
    classifiers,
    diffusion,
    drawings,
    encoder,
    examples,
    folder,
    judging,
    safety,
    samples,
)
from train_emoji.catalogue import REDUCED, SAFETY_CONCEPTS, Split, codes
from train_emoji.loop import Job, strip, train
from train_emoji.networks import Classifier

MINUTES = {
    "cpu": {"teacher": 8, "encoder": 30, "vae": 45, "unet": 90, "safety": 5, "judge": 5},
    "cuda": {"teacher": 1, "encoder": 3, "vae": 4, "unet": 10, "safety": 1, "judge": 1},
}
BATCH = {
    "cpu": {"teacher": 128, "encoder": 128, "vae": 16, "unet": 32, "safety": 128, "judge": 128},
    "cuda": {"teacher": 512, "encoder": 512, "vae": 128, "unet": 512, "safety": 512, "judge": 512},
}
RATE = {"cpu": 1e-3, "cuda": 2e-3}  # the UNet's
STAGES = tuple(MINUTES["cpu"])
GATE = 0.5  # top-1 accuracy on held-out drawings that the encoder must reach before a UNet is trained on it


class Run:
    """The stages as properties; each is trained, or loaded from its file, on first access."""

    def __init__(self, args: argparse.Namespace):
        self.work, self.seed, self.device = args.work, args.seed, torch.device(args.device)
        kind = "cpu" if self.device.type == "cpu" else "cuda"
        self.minutes, self.batch, self.rate = MINUTES[kind] | dict(args.minutes or ()), BATCH[kind], RATE[kind]
        self.until = time.monotonic() + 60 * args.budget
        self.prediction, self.keep = args.prediction, args.keep
        self.options = {"seed": args.seed, "scope": args.scope}
        self.drawings = drawings.load(self.work, self.until)
        self.split: Split = REDUCED if args.scope == "reduced" else drawings.everything(self.drawings, self.work)
        self.learnable = drawings.learnable(self.drawings, self.split)
        self.concept_drawings = self.learnable.of(self.split.concepts)
        self.held_out = drawings.held_out(self.drawings, self.split)
        self.figures: dict[str, dict[str, float]] = {}

    def train_job(self, job: Job, seed: int, after: tuple[str, ...] = (), **options: str) -> Any:
        """Train the job's model for its minutes and return it. Raises SystemExit if the budget ends before."""
        dependencies = self.options | options | {name: int(self.figures[name]["step"]) for name in after}
        model, figures = train(
            job, self.work, self.minutes[job.name], self.seed + seed, self.device, self.until, dependencies, self.keep
        )
        self.figures[job.name] = figures
        if figures["seconds"] < 60 * self.minutes[job.name]:
            raise SystemExit(f"the budget ended in stage {job.name}; run the same command to resume")
        return model

    def classifier(
        self, name: str, learnable: drawings.Drawings, preferred: list[str], seed: int, width: int
    ) -> Classifier:
        torch.manual_seed(self.seed + seed)
        return self.train_job(
            classifiers.job(
                name, learnable, preferred, self.held_out, self.device, width=width, batch=self.batch[name]
            ),
            seed,
        )

    @cached_property
    def teacher(self) -> Classifier:
        return self.classifier("teacher", self.learnable, self.split.concepts, 2, width=32)

    @cached_property
    def judge(self) -> Classifier:
        """The judge, with the model's concepts and the unseen ones as classes."""
        unseen = self.drawings.of(self.split.unseen, styles=set(self.learnable.styles.tolist()))
        return self.classifier(
            "judge",
            drawings.concat(self.concept_drawings, unseen),
            self.split.concepts + self.split.unseen,
            7,
            width=28,
        )

    def distil(
        self, name: str, model: Any, embed: Any, preferred: list[str], check: drawings.Drawings, seed: int
    ) -> Any:
        job = encoder.job(
            name, model, embed, self.learnable, self.teacher, preferred, check, self.device, batch=self.batch[name]
        )
        return self.train_job(job, seed, after=("teacher",))

    @cached_property
    def encoder(self) -> CLIPVisionModelWithProjection:
        torch.manual_seed(self.seed + 3)
        model = self.distil(
            "encoder",
            CLIPVisionModelWithProjection(**encoder.SETTINGS),
            encoder.image_embeds,
            self.split.concepts,
            self.held_out,
            3,
        )
        reached = self.figures["encoder"]["top-1"]
        if reached < GATE:
            more = 2 * self.minutes["encoder"]
            raise SystemExit(
                f"the encoder classifies {reached:.0%} of the held-out drawings, below the {GATE:.0%} needed to train "
                f"a UNet on it; pass --minutes encoder={more:g} to continue training it"
            )
        encoder.normalize(model, self.concept_drawings.rgb().to(self.device))
        return model

    @cached_property
    def vae(self) -> AutoencoderKL:
        torch.manual_seed(self.seed + 1)
        unseen = self.drawings.of(self.split.unseen, styles=set(self.learnable.styles.tolist()))
        model = self.train_job(
            autoencoder.job(self.concept_drawings, self.learnable, unseen, self.work, self.device, self.batch["vae"]), 1
        )
        autoencoder.normalize(model, self.concept_drawings.rgb().to(self.device))
        return model

    @cached_property
    def unet(self) -> Any:
        bank = self.bank()
        torch.manual_seed(self.seed + 4)
        evaluate = samples.evaluate(
            self.work,
            self.concept_drawings,
            self.held_out,
            self.vae,
            self.encoder,
            self.teacher,
            codes(self.split.concepts),
            self.prediction,
        )
        job = diffusion.job(
            self.concept_drawings,
            bank,
            self.device,
            prediction=self.prediction,
            evaluate=evaluate,
            batch=self.batch["unet"],
            rate=self.rate,
        )
        return self.train_job(job, 4, after=("encoder", "vae"), prediction=self.prediction)

    def bank(self) -> diffusion.Bank:
        """Return the UNet's training data, computed once per state of the VAE and the encoder."""
        image_encoder, vae = self.encoder, self.vae  # the encoder first, since it may stop the run
        path = self.work / "bank-{}-{}.pt".format(*(int(self.figures[name]["step"]) for name in ("vae", "encoder")))
        if not path.exists():
            torch.save(vars(diffusion.bank(self.concept_drawings, vae, image_encoder, self.seed, self.device)), path)
        return diffusion.Bank(**torch.load(path, map_location=self.device, weights_only=True))

    @cached_property
    def safety(self) -> StableDiffusionSafetyChecker:
        torch.manual_seed(self.seed + 5)
        concepts = list(SAFETY_CONCEPTS.values())
        check = self.drawings.of(concepts, styles=["openmoji"])
        model = self.distil("safety", StableDiffusionSafetyChecker(**safety.SETTINGS), safety.embed, concepts, check, 5)
        self.figures["safety"] |= safety.calibrate(model.cpu(), self.learnable, self.seed)
        return model

    @cached_property
    def folder(self) -> Path:
        """The checkpoint folder, after all stages."""
        target, unet = self.work / "imvar-emoji", self.unet
        pipe = folder.pipeline(self.vae, self.encoder, unet, self.safety, self.prediction)
        judging.write(self.judge, self.work / "test-assets" / "judge.safetensors")
        examples.write_fixture(self.work / "test-assets", self.drawings)
        examples.write_examples(target / "examples", self.work)
        folder.write(
            target,
            pipe,
            {
                "seed": self.seed,
                "torch": torch.__version__,
                "device": self.device.type,
                "prediction_type": self.prediction,
                "drawings": {"the UNet's": len(self.concept_drawings), "the other parts'": len(self.learnable)},
                "concepts": self.split.by_category,
                "held_out_concepts": self.split.unseen_by_category,
                "held_out_drawings": self.split.held_out,
                "stages": self.figures,
            },
        )
        return target


def minutes(text: str) -> float:
    if not text.replace(".", "", 1).isdecimal() or not float(text):
        raise argparse.ArgumentTypeError(f"expected minutes, such as 90 or 0.5, got {text!r}")
    return float(text)


def planned(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in STAGES:
        raise argparse.ArgumentTypeError(f"expected STAGE=MINUTES, such as unet=90, got {text!r}")
    return name, minutes(value)


def device(text: str) -> str:
    try:
        torch.zeros(1, device=text)
    except (RuntimeError, AssertionError) as error:  # torch raises either if it was built without it
        raise argparse.ArgumentTypeError(f"expected an available device, such as cpu, got {text!r}") from error
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path("out/train-emoji"), help="folder of all outputs and caches")
    add("--budget", type=minutes, default=math.inf, metavar="MINUTES", help="stop after this time (default: when done)")
    add("--minutes", type=planned, action="append", metavar="STAGE=MINUTES", help="change the minutes of a stage")
    add("--scope", choices=("reduced", "full"), help="187 concepts, or a thousand (default: full on CUDA)")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--prediction", choices=("v_prediction", "epsilon"), default="v_prediction", help="what the UNet predicts")
    add("--keep", action="store_true", help="continue a stage even if one that it builds on has changed")
    add(
        "--only",
        choices=("drawings", *STAGES),
        metavar="STAGE",
        help="stop after this stage, or after rendering the drawings; other stages may run in parallel",
    )
    add("--strip", choices=STAGES, action="append", metavar="STAGE", help="only make the file of this stage smaller")
    args = parser.parse_args()
    if args.strip:
        for name in args.strip:
            strip(args.work / f"{name}.pt")
        return
    args.scope = args.scope or ("reduced" if args.device == "cpu" else "full")
    print(json.dumps({name: str(value) for name, value in vars(args).items()}))
    output = getattr(Run(args), args.only or "folder")
    print(f"done: {output if args.only is None else args.only}")


if __name__ == "__main__":
    main()
