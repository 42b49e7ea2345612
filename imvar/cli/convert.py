"""`imvar convert`: convert a checkpoint to another layout or dtype."""

from __future__ import annotations

import argparse
import inspect
import sys
from functools import partial
from pathlib import Path

from ..choices import CHECKPOINT, REVISION
from ..conversion import convert
from ..conversion.inspect import checkpoint_stamps
from ..errors import InputError


def run(args: argparse.Namespace) -> int:
    """Call `convert`, whose arguments the options are named after. Exit status 2 also for what only it can check."""
    if args.source == CHECKPOINT:
        args.revision = args.revision or REVISION
    options = {name: value for name, value in vars(args).items() if name in inspect.signature(convert).parameters}
    target = [Path(args.target)]
    before = checkpoint_stamps(target)
    try:
        convert(**options, log=partial(print, flush=True))
    except InputError as error:
        print(f"imvar: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        state = "is unchanged" if checkpoint_stamps(target) == before else "has changed"
        print(f"imvar: interrupted; the target {state}", file=sys.stderr)
        return 130
    return 0
