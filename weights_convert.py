#!/usr/bin/env python3
"""Convert a checkpoint of this model, a file or a folder in any known layout, to another layout or dtype.

    python weights_convert.py sd-clip-vit-l14-img-embed_ema_only.ckpt OUT --fill PUBLISHED_FOLDER
    python weights_convert.py PUBLISHED_FOLDER OUT --dtype fp16 --verify
    python weights_convert.py OUT variations.safetensors --to original

From Python, use `imvar.conversion.convert`.
Exit status: 0 success, 1 failure (nothing is written), 2 invalid arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from imvar import ImvarError, InputError
from imvar.conversion import convert
from imvar.conversion.inspect import checkpoint_stamps


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = vars(parser().parse_args(argv))
    target = [Path(options["target"])]
    before = checkpoint_stamps(target)
    try:
        convert(**options, log=partial(print, flush=True))
    except BrokenPipeError:  # the reader of the report has closed it before the end, as `head` does
        sys.stdout = None
        return 1
    except (ImvarError, OSError) as error:
        print(f"weights_convert: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        state = "is unchanged" if checkpoint_stamps(target) == before else "has changed"
        print(f"weights_convert: interrupted; the target {state}", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser, whose arguments are those of `convert`."""
    result = argparse.ArgumentParser(
        prog="weights_convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Any = result.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="a folder in diffusers' layout of any age, the folder or file of one part, or an original .ckpt or "
        ".safetensors file",
    )
    add("target", metavar="TARGET", help="a folder, or a .safetensors file with --to original; replaced if it exists")
    add("--to", choices=("diffusers", "original"), default="diffusers", help="layout to write (default: diffusers)")
    add(
        "--dtype",
        choices=("keep", "fp32", "fp16", "bf16"),
        default="keep",
        help="dtype of all floating-point tensors (default: keep the dtype of each)",
    )
    add(
        "--ema",
        choices=("auto", "yes", "no"),
        default="auto",
        help="use the moving average of the UNet's weights (default: auto, if there is one)",
    )
    add("--part", choices=("unet", "vae", "image_encoder", "safety_checker"), help="convert this part alone")
    add("--fill", metavar="CHECKPOINT", help="take parts missing from SOURCE, such as the safety checker, from here")
    add(
        "--config",
        metavar="FOLDER",
        help="use the configs in this folder, in diffusers' layout, instead of those of SOURCE or those inferred from "
        "its tensors",
    )
    add("--max-shard-size", default="10GB", metavar="SIZE", help="split larger weights files (default: 10GB)")
    add("--dry-run", action="store_true", help="report what would be done, and write nothing")
    add("--verify", action="store_true", help="read the new files back and compare every bit")
    return result


if __name__ == "__main__":
    sys.exit(main())
