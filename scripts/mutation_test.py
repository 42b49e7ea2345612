"""Mutation testing of argument checks: remove one check at a time, and run the tests that should fail without it.

    python scripts/mutation_test.py [-n 40] [--seed 0] [FILE ...]
    python scripts/mutation_test.py --list [FILE ...]     # print the checks, run nothing

A check is an `if` that ends in `raise`, or a call of a `check_*` function. FILE: modules such as imvar/noise.py
(default: all that contain checks). Each mutant is a copy of the package in a temporary folder; it is detected if a
test fails. Prints the mutants that are not detected and the share of those that are.
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
MAX_ADDRESS_SPACE = 10 * 2**30  # bytes per run of the tests
TIMEOUT = 900  # seconds per run
PREFIX = "check_"
RETURN_SECOND = ("check_int", "check_float", "check_finite", "check_type")  # they return the value, their 2nd argument

# The tests that should detect a missing check, by the start of the module's path; the first match counts
CALLS = "pipeline models/test_model_arguments.py promises/test_seeds.py runtime/test_approximations.py"
CONFIGS = "weights/test_hostile_configs.py weights/test_loading.py weights/test_load_save_options.py"
FORKS = "promises/test_forks.py promises/test_diffusers_api.py"
TESTS = {
    "atomic/": "atomic weights/test_writing.py weights/test_load_save_options.py",
    "weights/": f"weights atomic {FORKS} conversion",
    "conversion/": "conversion cli/test_convert_command.py weights/test_original_layouts.py",
    "kernels/": "kernels runtime models",
    "models/": f"models {CONFIGS} {FORKS} {CALLS}",
    "schedulers/": f"schedulers models/test_model_arguments.py {CONFIGS}",
    "image/": f"image models/test_model_arguments.py {CONFIGS} pipeline cli",
    "runtime/": f"runtime {CALLS}",
    "pipeline/": f"{CALLS} {CONFIGS} {FORKS} weights/test_single_file.py runtime",
    "cli.py": "cli weights/test_bundled.py",
    "": f"{CALLS} schedulers image {CONFIGS} atomic",
}


def detecting_tests(file: str) -> list[str]:
    names = next(names for start, names in TESTS.items() if file.startswith(f"imvar/{start}"))
    return [f"tests/{name}" for name in dict.fromkeys(names.split())]


def checks(source: str) -> list[tuple[int, int]]:
    """Return line and column of each check."""
    return sorted((node.lineno, node.col_offset) for node in ast.walk(ast.parse(source)) if is_check(node))


def is_check(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return not node.orelse and isinstance(node.body[-1], ast.Raise)
    call = node.value if isinstance(node, ast.Expr) else node
    name = getattr(call.func, "id", "") if isinstance(call, ast.Call) else ""
    if call is not node:
        return name.startswith(PREFIX)
    return name in RETURN_SECOND and len(call.args) > 1


class RemoveCheck(ast.NodeTransformer):
    """Remove one check: its condition becomes False after evaluation, or its value passes through unchecked."""

    def __init__(self, position: tuple[int, int]) -> None:
        self.position = position

    def visit(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        if not is_check(node) or (node.lineno, node.col_offset) != self.position:
            return node
        if isinstance(node, ast.If):
            node.test = ast.BoolOp(ast.And(), [node.test, ast.Constant(False)])
            return node
        return ast.Pass() if isinstance(node, ast.Expr) else node.args[1]


def mutate(source: str, position: tuple[int, int]) -> str:
    return ast.unparse(ast.fix_missing_locations(RemoveCheck(position).visit(ast.parse(source))))


def is_detected(file: str, position: tuple[int, int]) -> bool:
    """Return whether a test fails without this check."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("imvar", "tests", "scripts"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "weights_convert.py"):
            shutil.copy(ROOT / name, copy / name)
        (copy / file).write_text(mutate((ROOT / file).read_text(), position))
        run = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-x", *detecting_tests(file)],
            cwd=copy,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1"},
        )
        resource.prlimit(run.pid, resource.RLIMIT_AS, (MAX_ADDRESS_SPACE, MAX_ADDRESS_SPACE))
        try:
            output = run.communicate(timeout=TIMEOUT)[0]
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate()
            return True
        if run.returncode > 1:  # pytest itself failed; a run that was killed has a negative status
            raise RuntimeError(output[-2000:])
        return run.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("-n", type=int, help="test a random sample of N checks (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of that sample")
    parser.add_argument("--jobs", type=int, default=2, help="mutants that are tested at the same time")
    parser.add_argument("--list", action="store_true", help="print the checks and their number, and run nothing")
    args = parser.parse_args()
    files = args.files or sorted(str(path.relative_to(ROOT)) for path in (ROOT / "imvar").rglob("*.py"))
    mutants = [(file, position) for file in files for position in checks((ROOT / file).read_text())]

    def describe(file: str, position: tuple[int, int]) -> str:
        line, column = position
        return f"{file}:{line}:{column}: {(ROOT / file).read_text().splitlines()[line - 1].strip()}"

    if args.n:
        mutants = random.Random(args.seed).sample(mutants, min(args.n, len(mutants)))
    if args.list:
        print(*(describe(*mutant) for mutant in mutants), f"{len(mutants)} checks", sep="\n")
        return 0
    with ThreadPoolExecutor(args.jobs) as pool:
        results = []
        for mutant, detected in zip(mutants, pool.map(lambda mutant: is_detected(*mutant), mutants), strict=True):
            results.append(detected)
            if not detected:
                print(f"not detected: {describe(*mutant)}", flush=True)
    print(f"{sum(results)} of {len(results)} mutants detected")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
