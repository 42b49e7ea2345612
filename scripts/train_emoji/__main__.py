"""Train imvar-emoji, the small checkpoint that imvar carries: from npm packages to a folder, in one command.

    python scripts/train_emoji [--work out/train-default] [--budget MINUTES] [--scope reduced|full]

Needs `npm`, which fetches 24 MB of drawings, and `pip install .[train]`. Everything is kept in the work folder: a run
that was stopped, or that used up its --budget (exit status 1), goes on where it was when started again. Sample grids
(*.png) and logs (*.jsonl) appear there along the way; the checkpoint is in WORK/imvar-emoji, and nothing outside is
written.

The stages: teacher, encoder (which has to name half of the held-out drawings before the rest is begun), vae, unet,
safety, judge. On a CPU each has minutes planned that suit two cores; `--minutes unet=120` plans otherwise. A stage that
was done with fewer minutes than planned trains on, and those that build on it are begun again, or kept and trained on
as well with --keep.
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

sys.path.insert(0, str(Path(__file__).parents[1]))

from imvar import AutoencoderKL, CLIPVisionModelWithProjection, StableDiffusionSafetyChecker
from train_emoji import autoencoder, diffusion, drawings, encoder, examples, folder, judging, naming, safety, samples
from train_emoji.catalogue import REDUCED, SAFETY_CONCEPTS, Split, codes
from train_emoji.loop import Job, train
from train_emoji.networks import Namer

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
GATE = 0.5  # of the held-out drawings the encoder has to name, before a UNet is trained to listen to it


class Run:
    """The stages: each is a property that is trained, or read from its file, when something first asks for it."""

    def __init__(self, args: argparse.Namespace):
        self.work, self.seed, self.device = args.work, args.seed, torch.device(args.device)
        kind = "cpu" if self.device.type == "cpu" else "cuda"
        self.minutes, self.batch, self.rate = MINUTES[kind] | dict(args.minutes or ()), BATCH[kind], RATE[kind]
        self.until = time.monotonic() + 60 * args.budget
        self.prediction, self.keep = args.prediction, args.keep
        self.options = {"seed": args.seed, "scope": args.scope}
        self.all = drawings.load(self.work)
        self.split: Split = REDUCED if args.scope == "reduced" else drawings.everything(self.all, self.work)
        self.known = drawings.learnable(self.all, self.split)
        self.ours = self.known.of(self.split.concepts)
        self.held_out = drawings.held_out(self.all, self.split)
        self.figures: dict[str, dict[str, float]] = {}

    def trained(self, job: Job, seed: int, after: tuple[str, ...] = (), **options: str) -> Any:
        """The job's model, trained for its minutes; SystemExit where the budget ends before."""
        begun_with = self.options | options | {name: int(self.figures[name]["step"]) for name in after}
        model, figures = train(
            job, self.work, self.minutes[job.name], self.seed + seed, self.device, self.until, begun_with, self.keep
        )
        self.figures[job.name] = figures
        if figures["seconds"] < 60 * self.minutes[job.name]:
            raise SystemExit(f"the budget ended in {job.name}; the same command goes on from there")
        return model

    def namer(self, name: str, known: drawings.Drawings, preferred: list[str], seed: int, width: int) -> Namer:
        torch.manual_seed(self.seed + seed)
        return self.trained(
            naming.job(name, known, preferred, self.held_out, self.device, width=width, batch=self.batch[name]), seed
        )

    @cached_property
    def teacher(self) -> Namer:
        return self.namer("teacher", self.known, self.split.concepts, 2, width=32)

    @cached_property
    def judge(self) -> Namer:
        """Knows the model's concepts and the unseen ones, to tell whether something like those comes out."""
        unseen = self.all.of(self.split.unseen, styles=set(self.known.styles.tolist()))
        return self.namer(
            "judge", drawings.together(self.ours, unseen), self.split.concepts + self.split.unseen, 7, width=28
        )

    def distilled(
        self, name: str, model: Any, embed: Any, preferred: list[str], check: drawings.Drawings, seed: int
    ) -> Any:
        job = encoder.job(
            name, model, embed, self.known, self.teacher, preferred, check, self.device, batch=self.batch[name]
        )
        return self.trained(job, seed, after=("teacher",))

    @cached_property
    def encoder(self) -> CLIPVisionModelWithProjection:
        torch.manual_seed(self.seed + 3)
        model = self.distilled(
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
                f"the encoder names {reached:.0%} of the held-out drawings, and a UNet is worth training "
                f"from {GATE:.0%} on: --minutes encoder={more:g} trains the encoder on"
            )
        encoder.normalize(model, self.ours.rgb().to(self.device))
        return model

    @cached_property
    def vae(self) -> AutoencoderKL:
        torch.manual_seed(self.seed + 1)
        unseen = self.all.of(self.split.unseen, styles=set(self.known.styles.tolist()))
        model = self.trained(
            autoencoder.job(self.ours, self.known, unseen, self.work, self.device, self.batch["vae"]), 1
        )
        autoencoder.normalize(model, self.ours.rgb().to(self.device))
        return model

    @cached_property
    def unet(self) -> Any:
        bank = self.bank()
        torch.manual_seed(self.seed + 4)
        look = samples.look(
            self.work,
            self.ours,
            self.held_out,
            self.vae,
            self.encoder,
            self.teacher,
            codes(self.split.concepts),
            self.prediction,
        )
        job = diffusion.job(
            self.ours,
            bank,
            self.device,
            prediction=self.prediction,
            look=look,
            batch=self.batch["unet"],
            rate=self.rate,
        )
        return self.trained(job, 4, after=("encoder", "vae"), prediction=self.prediction)

    def bank(self) -> diffusion.Bank:
        """What the UNet learns from, computed once for each state of the stages before."""
        image_encoder, vae = self.encoder, self.vae  # in this order, since the encoder has a gate to pass
        path = self.work / "bank-{}-{}.pt".format(*(int(self.figures[name]["step"]) for name in ("vae", "encoder")))
        if not path.exists():
            torch.save(vars(diffusion.bank(self.ours, vae, image_encoder, self.seed, self.device)), path)
        return diffusion.Bank(**torch.load(path, map_location=self.device, weights_only=True))

    @cached_property
    def safety(self) -> StableDiffusionSafetyChecker:
        torch.manual_seed(self.seed + 5)
        looked_for = list(SAFETY_CONCEPTS.values())
        check = self.all.of(looked_for, styles=["openmoji"])
        model = self.distilled(
            "safety", StableDiffusionSafetyChecker(**safety.SETTINGS), safety.embed, looked_for, check, 5
        )
        self.figures["safety"] |= safety.calibrate(model.cpu(), self.known, self.seed)
        return model

    @cached_property
    def folder(self) -> Path:
        """Everything."""
        target, unet = self.work / "imvar-emoji", self.unet
        pipe = folder.pipeline(self.vae, self.encoder, unet, self.safety, self.prediction)
        judging.write(self.judge, self.work / "test-assets" / "judge.safetensors")
        examples.write_fixture(self.work / "test-assets", self.all)
        examples.write_examples(target / "examples", self.work)
        folder.write(
            target,
            pipe,
            {
                "seed": self.seed,
                "torch": torch.__version__,
                "device": self.device.type,
                "prediction_type": self.prediction,
                "drawings": {"the UNet's": len(self.ours), "the other parts'": len(self.known)},
                "concepts": self.split.by_category,
                "held_out_concepts": self.split.unseen_by_category,
                "held_out_drawings": self.split.held_out,
                "stages": self.figures,
            },
        )
        return target


def minutes(text: str) -> float:
    if not text.replace(".", "", 1).isdecimal() or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r}: minutes would do, as in 90 or 0.5")
    return float(text)


def planned(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in STAGES:
        raise argparse.ArgumentTypeError(f"{text!r}: STAGE=MINUTES would do, as in unet=90")
    return name, minutes(value)


def device(text: str) -> str:
    try:
        torch.zeros(1, device=text)
    except (RuntimeError, AssertionError) as error:  # torch raises either for what it was not built with
        raise argparse.ArgumentTypeError(f"{text!r}: not here, or not known to this torch; cpu would do") from error
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path("out/train-default"), help="where everything is kept")
    add("--budget", type=minutes, default=math.inf, metavar="MINUTES", help="stop after that long (default: when done)")
    add("--minutes", type=planned, action="append", metavar="STAGE=MINUTES", help="plan other than the usual minutes")
    add("--scope", choices=("reduced", "full"), help="187 concepts, or a thousand (default: full on CUDA)")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--prediction", choices=("v_prediction", "epsilon"), default="v_prediction", help="what the UNet predicts")
    add("--keep", action="store_true", help="go on with a stage although one that it builds on was trained on")
    add("--only", choices=STAGES, metavar="STAGE", help="stop after this stage; others may run beside it")
    args = parser.parse_args()
    args.scope = args.scope or ("reduced" if args.device == "cpu" else "full")
    print(json.dumps({name: str(value) for name, value in vars(args).items()}))
    made = getattr(Run(args), args.only or "folder")
    print(f"done: {made if args.only is None else args.only}")


if __name__ == "__main__":
    main()
