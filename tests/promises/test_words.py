"""The prose is English that the field uses: words and openings of a former dialect do not return (CONTRIBUTING.md)."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAGMENTS = re.compile(r"would do| came\b|is told|of others|\blest\b|\banew\b")
OPENINGS = ("What", "Whatever", "Whoever", "Of")
PYTHON = sorted((ROOT / "imvar").rglob("*.py"))
TEXTS = sorted(
    [
        *PYTHON,
        *(ROOT / "imvar").rglob("*.md"),
        ROOT / "weights_convert.py",
        *(
            file
            for file in (ROOT / "scripts").rglob("*")
            if file.is_file() and file.suffix in ("", ".py") and file.name != "NOTICE"
        ),
    ]
)


def docstrings(tree: ast.Module) -> dict[int, str]:
    """Return the docstrings of a module and of all its classes and functions, by line."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    owners = [node for node in ast.walk(tree) if isinstance(node, nodes)]
    return {getattr(node, "lineno", 1): text for node in owners if (text := ast.get_docstring(node))}


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_fragment_of_the_dialect(file):
    lines = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
    assert [(i, line) for i, line in lines if FRAGMENTS.search(line)] == []


@pytest.mark.parametrize("file", PYTHON, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_docstring_opens_with_a_free_relative(file):
    texts = docstrings(ast.parse(file.read_text(encoding="utf-8"))).items()
    assert {line: text for line, text in texts if text.split()[0] in OPENINGS} == {}
