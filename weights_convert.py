#!/usr/bin/env python3
"""Convert a checkpoint: any file or folder of this model's weights in, a clean one out.

    python weights_convert.py sd-clip-vit-l14-img-embed_ema_only.ckpt OUT --fill PUBLISHED_FOLDER
    python weights_convert.py PUBLISHED_FOLDER OUT --dtype fp16 --verify
    python weights_convert.py OUT variations.safetensors --to original

`imvar.conversion.convert` does the work. Exit status: 0 done, 1 failed and nothing written, 2 misused, 130 stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from imvar import ImvarError, InputError
from imvar.conversion import convert


def main(argv: Sequence[str] | None = None) -> int:
    options = vars(parser().parse_args(argv))
    try:
        convert(**options, log=partial(print, flush=True))
    except BrokenPipeError:  # whoever read along has read enough, but not seen the job done
        sys.stdout = None
        return 1
    except (ImvarError, OSError) as error:
        print(f"weights_convert: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("weights_convert: stopped; the target is as it was", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    job = argparse.ArgumentParser(
        prog="weights_convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Any = job.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="a folder in diffusers' layout of any age, the folder or file of one part, or "
        "an original .ckpt or .safetensors file",
    )
    add("target", metavar="TARGET", help="a folder, or with --to original a .safetensors file; replaced if it is there")
    add("--to", choices=("diffusers", "original"), default="diffusers", help="the layout to write (default: diffusers)")
    add(
        "--dtype",
        choices=("keep", "fp32", "fp16", "bf16"),
        default="keep",
        help="what floating tensors become (default: keep, each as it is)",
    )
    add(
        "--ema",
        choices=("auto", "yes", "no"),
        default="auto",
        help="whether to take the moving average of the UNet's weights (default: auto, if there is one)",
    )
    add("--part", choices=("unet", "vae", "image_encoder", "safety_checker"), help="convert this part alone")
    add("--fill", metavar="CHECKPOINT", help="take parts that SOURCE has not, such as the safety checker, from here")
    add(
        "--config",
        metavar="FOLDER",
        help="go by the settings in this folder, in diffusers' layout, instead of those "
        "that come with SOURCE or are told by its tensors",
    )
    add("--max-shard-size", default="10GB", metavar="SIZE", help="of a file in a folder (default: 10GB)")
    add("--dry-run", action="store_true", help="say what would be done, and write nothing")
    add("--verify", action="store_true", help="read back what was written and compare every bit")
    return job


if __name__ == "__main__":
    sys.exit(main())
