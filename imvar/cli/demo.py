"""`imvar demo`: variations of the bundled drawings; with another checkpoint, of the photos of a checkout."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..choices import EMOJI
from ..loading import is_emoji
from .render import make_images
from .vary import vary_rows

PHOTOS = Path("tests/photos")


def run(args: argparse.Namespace) -> None:
    if not is_emoji(args.checkpoint):
        args.photos = sorted(PHOTOS.glob("*.jpg"))
        if not args.photos:
            hint = "use imvar vary PHOTO"
            args.usage_error(
                f"--checkpoint: expected {EMOJI} where there is no {PHOTOS}, got {args.checkpoint}; {hint}"
            )
    make_images(args, vary_rows)
