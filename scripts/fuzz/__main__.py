"""Fuzz loading: corrupted tiny checkpoints and images load completely or raise errors, within time and memory.

    python scripts/fuzz [--cases 100000] [--seed 0] [--workers 2] [--case N]

A case corrupts one file of one part, by its structure (configs, headers, indexes, pickles) or by its bytes, or replaces
it. Cases run in child processes, so that crashes and hangs are reported. A fault is printed with its number, and
`--case N` runs that case alone and prints the full error.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]

from fuzz.cases import file_groups, run_case
from fuzz.corpus import write_corpus
from fuzz.workers import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--case", type=int, help="run this case alone")
    args = parser.parse_args()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="imvar-fuzz-", dir=memory) as name:
        folder = Path(name)
        if args.case is not None:
            write_corpus(folder)
            print(*run_case(args.case, args.seed, folder, file_groups(folder)), sep="\n")
            return
        start = time.monotonic()
        outcomes = run(args.cases, args.seed, args.workers, folder)
    print(f"{args.cases} cases in {time.monotonic() - start:.0f} s: {dict(outcomes)}")
    if set(outcomes) - {"loaded", "refused"}:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
