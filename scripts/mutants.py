"""Do the tests notice when a check is gone? Takes out one check after another, and runs the tests each time.

    python scripts/mutants.py [-n 40] [--seed 0] [FILE ...]

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
STATEMENTS = ("one_of", "tensor", "alike", "sizes", "levels", "side", "check_latents", "check_generator",
              "check_finite", "look_at", "step_inputs")

CALLS = ("tests/test_calls.py tests/test_refusals.py tests/test_pipeline.py tests/test_flagged.py tests/test_seeds.py "
         "tests/test_approximate.py")
PICTURES = "tests/test_image.py tests/test_refusals.py tests/test_hostile_settings.py tests/test_pipeline.py"
WALKS = "tests/test_walks.py tests/test_schedulers.py tests/test_refusals.py tests/test_hostile_settings.py"
MODELS = "tests/test_refusals.py tests/test_hostile_settings.py tests/test_forks.py tests/test_memory.py"
READ = ("tests/test_hostile_files.py tests/test_hostile_settings.py tests/test_loading.py "
        "tests/test_hostile_pickles.py tests/test_single_file.py tests/test_habits.py tests/test_published.py")
WRITTEN = "tests/test_saving.py tests/test_writing.py tests/test_saving_places.py tests/test_habits.py"
CONVERTED = ("tests/test_convert_command.py tests/test_convert_options.py tests/test_convert_faults.py "
             "tests/test_convert.py tests/test_originals.py")
CHECKING = {  # and the tests that are to notice
    "imvar/pipeline/checks.py": CALLS, "imvar/pipeline/variation.py": CALLS, "imvar/pipeline/parts.py": CALLS,
    "imvar/pipeline/steps.py": CALLS, "imvar/pipeline/flagged.py": CALLS,
    "imvar/pipeline/assembly.py": CALLS + " tests/test_memory.py tests/test_compiled.py",
    "imvar/noise.py": CALLS + " tests/test_schedulers.py",
    "imvar/memory.py": CALLS + " tests/test_memory.py",
    "imvar/checks.py": f"{CALLS} {WALKS} tests/test_image.py tests/test_loading.py {WRITTEN}",
    "imvar/photos.py": PICTURES + " tests/test_cli.py", "imvar/image/read.py": PICTURES,
    "imvar/image/vae.py": PICTURES, "imvar/image/clip.py": PICTURES, "imvar/image/resize.py": PICTURES,
    "imvar/config.py": WALKS + " tests/test_loading.py",
    "imvar/schedulers/common.py": WALKS, "imvar/schedulers/tables.py": WALKS, "imvar/schedulers/ddim.py": WALKS,
    "imvar/schedulers/lms.py": WALKS, "imvar/schedulers/pndm.py": WALKS,
    "imvar/models/inputs.py": MODELS, "imvar/models/attention.py": MODELS, "imvar/models/clip.py": MODELS,
    "imvar/models/freeu.py": MODELS, "imvar/models/layers.py": MODELS, "imvar/models/unet.py": MODELS,
    "imvar/models/vae.py": MODELS, "imvar/models/safety.py": MODELS + " tests/test_flagged.py",
    "imvar/models/fp8.py": "tests/test_approximate.py",
    "imvar/models/compiled.py": "tests/test_refusals.py tests/test_compiled.py",
    "imvar/cli.py": "tests/test_cli.py tests/test_convert_command.py tests/test_bundled.py",
    "imvar/pipeline/storage.py": f"{READ} {WRITTEN}",
} | {f"imvar/weights/{name}.py": tests for names, tests in {
    "files folders index keymap loading pickles pretrained reading settings single stems survey": READ,
    "writing": WRITTEN, "bundled": "tests/test_bundled.py tests/test_loading.py", "conversion targets": CONVERTED,
}.items() for name in names.split()}


def checks(source: str) -> list[tuple[int, int]]:
    """Where the checks are, by line and column."""
    return sorted((node.lineno, node.col_offset) for node in ast.walk(ast.parse(source)) if is_check(node))


def is_check(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return not node.orelse and isinstance(node.body[-1], ast.Raise)
    name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
    return name in STATEMENTS or (name in VALUES and len(node.args) > 1)


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
        return node.args[1] if node.func.id in VALUES else ast.Constant(None)


def without(source: str, where: tuple[int, int]) -> str:
    return ast.unparse(ast.fix_missing_locations(Without(where).visit(ast.parse(source))))


def noticed(file: str, where: tuple[int, int], tests: str) -> bool:
    """Whether a test fails without this check."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("imvar", "tests", "scripts"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "checkpoints"))
        shutil.copytree(ROOT / "imvar" / "checkpoints", copy / "imvar" / "checkpoints")
        for name in ("pyproject.toml", "README.md", "weights_convert.py"):
            shutil.copy(ROOT / name, copy / name)
        (copy / file).write_text(without((ROOT / file).read_text(), where))
        there = [test for test in tests.split() if (copy / test).exists()]
        run = subprocess.Popen([sys.executable, "-m", "pytest", "-x", *there], cwd=copy, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1"})
        resource.prlimit(run.pid, resource.RLIMIT_AS, (MOST, MOST))
        try:
            told = run.communicate(timeout=PATIENCE)[0]
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate()
            return True
        if run.returncode not in (0, 1) and run.returncode > 0:
            raise RuntimeError(told[-2000:])
        return run.returncode != 0  # also where it was killed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("-n", type=int, help="so many of the checks, drawn by chance (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    found = [(file, where, CHECKING[file]) for file in args.files or CHECKING
             for where in checks((ROOT / file).read_text())]
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
