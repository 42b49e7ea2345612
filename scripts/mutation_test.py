"""Do the tests notice when a check is gone? Takes out one check after another, and runs the tests each time.

    python scripts/mutation_test.py [-n 40] [--seed 0] [FILE ...]

A check is an `if` at the end of which an error is raised, or a call of one of the functions of imvar/checks.py and the
like. FILE: modules of imvar (default: all that check). Each mutant is a copy of the package in a temporary folder, and
is noticed if a test fails. Prints those that are not, and the share that is.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST, PATIENCE = 10 * 2**30, 900  # bytes, and seconds, of a run
VALUES = ("count", "real", "finite")  # checks that give back what they are shown, second
STATEMENTS = (
    "one_of",
    "tensor",
    "alike",
    "dense",
    "floats",
    "readable",
    "option",
    "sizes",
    "levels",
    "side",
    "tiles",
    "seen",
    "time",
    "load",
    "between",
    "check_latents",
    "check_generator",
    "check_finite",
    "check_pixels",
    "check_callback",
    "check_parts",
    "check_devices",
    "check_fit",
    "check_context",
    "check_walk",
    "check_seeds",
    "look_at",
)

# The tests that are to notice, by the files that check
CALLS = "calls refusals parts pipeline flagged seeds approximate"
PICTURES = "image pictures refusals parts options pipeline"
WALKS = "walks schedulers refusals hostile_settings"
MODELS = "refusals parts hostile_settings forks memory"
READ = (
    "options hostile_files hostile_settings hostile_pickles loading single_file habits published bundled forks convert"
)
WRITTEN = "options saving writing saving_places saving_killed habits convert_faults"
CONVERTED = "options convert_command convert_options convert_faults convert originals"
NOTICING = {
    CALLS: "pipeline/checks pipeline/variation pipeline/parts pipeline/steps pipeline/flagged noise memory",
    f"{CALLS} memory compiled": "pipeline/assembly models/compiled models/fp8",
    f"{CALLS} {WALKS} image loading {WRITTEN}": "checks",
    f"{PICTURES} cli": "photos image/read image/vae image/clip image/resize",
    WALKS: "schedulers/common schedulers/tables schedulers/ddim schedulers/lms schedulers/pndm",
    f"{WALKS} options loading": "config",
    f"{MODELS} flagged": "models/inputs models/attention models/clip models/freeu models/layers models/unet models/vae "
    "models/safety",
    READ: "weights/files weights/index weights/keymap weights/loading weights/pickles weights/reading weights/settings "
    "weights/single weights/stems weights/options weights/survey weights/bundled",
    f"{READ} {WRITTEN}": "weights/pretrained pipeline/storage",
    WRITTEN: "weights/writing weights/folders",
    CONVERTED: "weights/conversion weights/targets",
    "cli convert_command bundled": "cli",
}
CHECKING = {
    f"imvar/{file}.py": [f"tests/test_{test}.py" for test in dict.fromkeys(tests.split())]
    for tests, files in NOTICING.items()
    for file in files.split()
}


def checks(source: str) -> list[tuple[int, int]]:
    """Where the checks are, by line and column."""
    return sorted((node.lineno, node.col_offset) for node in ast.walk(ast.parse(source)) if is_check(node))


def is_check(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return not node.orelse and isinstance(node.body[-1], ast.Raise)
    call = node.value if isinstance(node, ast.Expr) else node
    name = getattr(call.func, "id", "") if isinstance(call, ast.Call) else ""
    return name in STATEMENTS if call is not node else name in VALUES and len(call.args) > 1


class Without(ast.NodeTransformer):
    """Takes one check out: a condition is False, whatever it computes on the way; a value is what came."""

    def __init__(self, where: tuple[int, int]) -> None:
        self.where = where

    def visit(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        if not is_check(node) or (node.lineno, node.col_offset) != self.where:
            return node
        if isinstance(node, ast.If):
            node.test = ast.BoolOp(ast.And(), [node.test, ast.Constant(False)])
            return node
        return ast.Pass() if isinstance(node, ast.Expr) else node.args[1]


def without(source: str, where: tuple[int, int]) -> str:
    return ast.unparse(ast.fix_missing_locations(Without(where).visit(ast.parse(source))))


def noticed(file: str, where: tuple[int, int], tests: list[str]) -> bool:
    """Whether a test fails without this check."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("imvar", "tests", "scripts"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "checkpoints"))
        shutil.copytree(ROOT / "imvar" / "checkpoints", copy / "imvar" / "checkpoints")
        for name in ("pyproject.toml", "README.md", "weights_convert.py"):
            shutil.copy(ROOT / name, copy / name)
        (copy / file).write_text(without((ROOT / file).read_text(), where))
        run = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-x", *tests],
            cwd=copy,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1"},
        )
        resource.prlimit(run.pid, resource.RLIMIT_AS, (MOST, MOST))
        try:
            told = run.communicate(timeout=PATIENCE)[0]
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate()
            return True
        if run.returncode > 1:
            raise RuntimeError(told[-2000:])
        return run.returncode != 0  # also where it was killed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("-n", type=int, help="so many of the checks, drawn by chance (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    found = [
        (file, where, CHECKING[file]) for file in args.files or CHECKING for where in checks((ROOT / file).read_text())
    ]
    if args.n:
        found = random.Random(args.seed).sample(found, min(args.n, len(found)))
    with ThreadPoolExecutor(args.jobs) as pool:
        results = []
        seens = pool.map(lambda mutant: noticed(*mutant), found)
        for (file, (line, column), _), seen in zip(found, seens, strict=True):
            results.append(seen)
            if not seen:
                code = (ROOT / file).read_text().splitlines()[line - 1]
                print(f"{file}:{line}:{column}: nobody noticed: {code.strip()}", flush=True)
    print(f"{sum(results)} of {len(results)} checks are missed when they are gone")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
