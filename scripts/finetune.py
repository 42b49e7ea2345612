"""Fine-tune the UNet of a checkpoint on images.

python scripts/finetune.py PHOTOS... --out OUT [--model MODEL] [--stage cross-attention|unet|lora]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from finetuning.settings import STAGES, Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="+")
    add("--out", type=Path, required=True)
    add("--model", default="imvar-emoji")
    add("--stage", choices=STAGES, default="lora")
    add("--steps", type=int, default=1000)
    add("--batch", type=int, default=8)
    add("--gradient-accumulation", type=int, default=1)
    add("--learning-rate", type=float, default=1e-5)
    add("--warmup-steps", type=int, default=0)
    add("--drop-embedding", type=float, default=0.1)
    add("--snr-gamma", type=float)
    add("--ema-decay", type=float, default=0.999)
    add("--rank", type=int, default=16)
    add("--alpha", type=float)
    add("--seed", type=int, default=0)
    add("--validate", nargs="+")
    add("--save-every", type=int, default=500)
    add("--sample-every", type=int, default=500)
    add("--log-every", type=int, default=10)
    add("--workers", type=int, default=2)
    add("--merge", action="store_true")
    add("--shard", action="store_true")
    add("--no-bank", dest="bank", action="store_false")
    settings = Settings(**vars(parser.parse_args()))

    from finetuning.export import export
    from finetuning.loop import Trainer

    trainer = Trainer(settings)
    trainer.train()
    if trainer.accelerator.is_main_process:
        print(export(settings))


if __name__ == "__main__":
    main()
