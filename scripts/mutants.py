"""Do the tests notice when a check is gone? Takes out one check after another, and runs the tests each time.

    python scripts/mutants.py [-n 40] [--seed 0] [FILE ...]

A check is an `if` of which all that is done is to raise. FILE: modules of imvar (default: those that check). Each
mutant is a copy of the package in a temporary folder, and is noticed if a test fails. Prints those that are not, and
the share that is.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKING = {  # and the tests that are to notice
    "imvar/pipeline/checks.py": "tests/test_pipeline.py tests/test_approximate.py tests/test_flagged.py "
                                "tests/test_seeds.py tests/test_refusals.py",
    "imvar/checks.py": "tests/test_pipeline.py tests/test_schedulers.py tests/test_hostile_settings.py "
                       "tests/test_image.py tests/test_loading.py tests/test_seeds.py tests/test_refusals.py",
    "imvar/noise.py": "tests/test_pipeline.py tests/test_seeds.py tests/test_schedulers.py",
    "imvar/image/read.py": "tests/test_image.py",
    "imvar/image/vae.py": "tests/test_image.py tests/test_pipeline.py",
    "imvar/image/clip.py": "tests/test_image.py tests/test_hostile_settings.py",
    "imvar/photos.py": "tests/test_image.py tests/test_cli.py",
    "imvar/config.py": "tests/test_hostile_settings.py tests/test_schedulers.py tests/test_loading.py",
    "imvar/schedulers/common.py": "tests/test_schedulers.py tests/test_hostile_settings.py",
    "imvar/schedulers/tables.py": "tests/test_schedulers.py",
}


def checks(source: str) -> list[int]:
    """The lines of the `if`s that do nothing but raise."""
    tree = ast.parse(source)
    return [node.lineno for node in ast.walk(tree)
            if isinstance(node, ast.If) and not node.orelse and isinstance(node.body[-1], ast.Raise)]


def without(source: str, line: int) -> str:
    """The source with the condition of the `if` in that line put to False, whatever it computes on the way."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and node.lineno == line:
            node.test = ast.BoolOp(ast.And(), [node.test, ast.Constant(False)])
    return ast.unparse(ast.fix_missing_locations(tree))


def noticed(file: str, line: int, tests: str) -> bool:
    """Whether a test fails without this check."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("imvar", "tests", "scripts"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "checkpoints"))
        shutil.copytree(ROOT / "imvar" / "checkpoints", copy / "imvar" / "checkpoints")
        for name in ("pyproject.toml", "README.md", "weights_convert.py"):
            shutil.copy(ROOT / name, copy / name)
        (copy / file).write_text(without((ROOT / file).read_text(), line))
        there = [test for test in tests.split() if (copy / test).exists()]
        run = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", *there], cwd=copy, capture_output=True,
                             env=os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}, text=True, check=False)
        if run.returncode not in (0, 1):
            raise RuntimeError(run.stdout[-2000:] + run.stderr[-2000:])
        return run.returncode == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("-n", type=int, help="so many of the checks, drawn by chance (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    found = [(file, line, CHECKING[file]) for file in args.files or CHECKING
             for line in checks((ROOT / file).read_text())]
    if args.n:
        found = random.Random(args.seed).sample(found, min(args.n, len(found)))
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda mutant: noticed(*mutant), found))
    for (file, line, _), seen in zip(found, results, strict=True):
        if not seen:
            print(f"{file}:{line}: nobody noticed: {(ROOT / file).read_text().splitlines()[line - 1].strip()}")
    print(f"{sum(results)} of {len(results)} checks are missed when they are gone")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
