#!/usr/bin/env python3
"""`imvar convert`, for a checkout that is not installed: convert a checkpoint to another layout or dtype.

    python weights_convert.py sd-clip-vit-l14-img-embed_ema_only.ckpt OUT --fill PUBLISHED_FOLDER
    python weights_convert.py PUBLISHED_FOLDER OUT --dtype fp16 --verify
    python weights_convert.py OUT variations.safetensors --to original

From Python, use `imvar.conversion.convert`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from imvar import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run `imvar convert` and return its exit status."""
    return cli.main(["convert", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
