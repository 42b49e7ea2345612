"""Fine-tune the UNet of a checkpoint on images of your own.

    python scripts/finetune.py photos --out out/mine --checkpoint imvar-emoji --steps 200
    accelerate launch --num_processes 8 scripts/finetune.py photos --out out/mine --stage cross-attention --batch 16

Needs `pip install .[train]`. PHOTOS are folders, images, patterns, tar and parquet files. Each image is learned as a
variation of itself. OUT receives `pytorch_lora_weights.safetensors` or `checkpoint/`, which imvar and diffusers load,
with `samples/`, `loss.png`, `log.jsonl` and `tensorboard/` on the way. The same command continues a run that was
stopped. docs/training.md has recipes, those of the published model among them.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

from finetuning.settings import LEARNING_RATES, STAGES, Settings

from imvar.choices import CHECKPOINT
from imvar.cli.argument_types import float_arg, folder_arg, fraction_arg, int_arg, seed_arg
from imvar.errors import ImvarError
from imvar.image.pixel_values import PREPROCESS

positive_arg = partial(float_arg, low=1e-12)


def parse_arguments() -> tuple[Settings, bool]:
    """Return the settings, and whether the weights of a run that was stopped are to be exported, without training."""
    parser = argparse.ArgumentParser(
        usage="finetune.py PHOTOS... --out OUT [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add: Any = parser.add_argument
    add("images", nargs="*", metavar="PHOTOS", help="folders, images, patterns, .tar or .parquet files")
    add("--out", type=folder_arg, required=True, metavar="OUT", help="folder of all results")
    add("--export-only", action="store_true", help="write the weights of a run that was stopped, of its own stage")

    add = parser.add_argument_group("what is trained").add_argument
    add("--checkpoint", default=CHECKPOINT, help="any that imvar loads (default: %(default)s)")
    add("--revision", help="of a checkpoint on the hub")
    add("--stage", choices=STAGES, default="lora", help="cross-attention alone, all, or an adapter (default: lora)")
    add("--rank", type=partial(int_arg, high=1024), default=16, help="of the adapter's matrices (default: 16)")
    add("--alpha", type=positive_arg, help="of the adapter, whose scale is alpha / rank (default: the rank)")
    add("--merge", action="store_true", help="also write the checkpoint with the adapter in its weights")

    recipe = parser.add_argument_group("recipe")
    add = recipe.add_argument
    add("--steps", type=int_arg, default=1000, help="of the optimizer (default: 1000)")
    add("--batch", type=int_arg, default=8, help="images at a time on each GPU (default: 8)")
    add("--gradient-accumulation", type=int_arg, default=1, metavar="N", help="such batches per step (default: 1)")
    rates = ", ".join(f"{stage} {rate:g}" for stage, rate in LEARNING_RATES.items())
    add("--learning-rate", type=positive_arg, help=f"of AdamW, after the warm-up (default: {rates})")
    add("--warmup-steps", type=partial(int_arg, low=0), default=0, help="in which the rate rises (default: 0)")
    add("--weight-decay", type=partial(float_arg, low=0), default=0.01, help="of AdamW (default: 0.01)")
    add("--max-grad-norm", type=positive_arg, default=1.0, help="to which gradients are clipped (default: 1)")
    add("--drop-embedding", type=fraction_arg, default=0.1, help="share of images without embedding (default: 0.1)")
    add("--snr-gamma", type=positive_arg, help="Min-SNR weighting with this gamma, such as 5 (default: none)")
    ema = recipe.add_mutually_exclusive_group().add_argument
    ema("--ema-decay", type=fraction_arg, default=0.999, help="of the moving average of the weights (default: 0.999)")
    ema("--no-ema", dest="ema_decay", action="store_const", const=None, help="without one")
    add("--resolution", type=partial(int_arg, low=8), help="of the square images, in pixels (default: the model's)")
    add("--preprocess", choices=PREPROCESS, default="training", help="for the image encoder (default: training)")
    add("--random-flip", action="store_true", help="learn from the mirrored images as well")
    add("--skip-broken", action="store_true", help="leave out images that cannot be read")
    add("--seed", type=seed_arg, default=0, help="of all random numbers (default: 0)")

    add = parser.add_argument_group("memory and speed").add_argument
    add("--mixed-precision", choices=("no", "bf16"), help="bfloat16 autocast (default: bf16 on a GPU that has it)")
    add("--gradient-checkpointing", action="store_true", help="compute activations twice instead of keeping them")
    add("--shard", action="store_true", help="FSDP2: divide weights and states between the GPUs")
    add("--no-bank", dest="bank", action="store_false", help="encode the images in each step, not once")
    add("--workers", type=partial(int_arg, low=0), default=2, help="processes that read images (default: 2)")
    add("--cpu", action="store_true", help="although there is a GPU")

    add = parser.add_argument_group("reports").add_argument
    add("--validate", nargs="+", metavar="PHOTOS", help="images whose loss is reported at fixed noise")
    add("--log-every", type=int_arg, default=10, metavar="STEPS", help="log the loss (default: 10)")
    add("--sample-every", type=int_arg, default=500, metavar="STEPS", help="make samples, and validate (default: 500)")
    add("--save-every", type=int_arg, default=100, metavar="STEPS", help="save the state (default: 100)")
    add("--samples", type=partial(int_arg, low=0), default=4, help="images of which samples are made (default: 4)")
    options = vars(parser.parse_args())
    export_only = options.pop("export_only")
    if not options["images"] and not export_only:
        parser.error("PHOTOS: expected at least one, got none")
    if options["learning_rate"] is None:
        options["learning_rate"] = LEARNING_RATES[options["stage"]]
    return Settings(**options), export_only


def main() -> None:
    settings, export_only = parse_arguments()
    try:
        from finetuning.export import export
        from finetuning.loop import Trainer
    except ImportError as error:
        raise SystemExit(f"{error.name}: expected this package, got none; pip install '.[train]'") from error
    try:
        trainer = None if export_only else Trainer(settings)
        if trainer:
            trainer.train()
        if trainer is None or trainer.accelerator.is_main_process:
            print(export(settings))
    except ImvarError as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        print(f"{settings.out}: interrupted; the same command continues from the last save", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
