"""One name has one meaning: what `def` and `class` bind in two modules or more is listed below with what it means.

Counted are the names of functions, methods and classes, nested ones too, that two files of imvar/ define; double
underscores are Python's own. A name that is new to the list is either one meaning more, so another name is better, or
the same meaning again, so it is added with that meaning.
"""

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "imvar"
SHARED: dict[str, str] = {
    "forward": "the computation of a torch module",
}


def definitions() -> dict[str, list[str]]:
    """Return where each name is bound by `def` or `class`: `file:line`, at most one per file."""
    places: dict[str, dict[str, str]] = defaultdict(dict)
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = str(file.relative_to(PACKAGE))
                places[node.name].setdefault(name, f"{name}:{node.lineno}")
    return {name: list(by_file.values()) for name, by_file in places.items()}


def test_names_with_several_definitions_have_one_meaning():
    several = {name: places for name, places in definitions().items() if len(places) > 1 and name[:2] != "__"}
    assert {name: places for name, places in several.items() if name not in SHARED} == {}


def test_the_list_is_current():
    places = definitions()
    assert [name for name in SHARED if len(places.get(name, [])) < 2] == []
