"""Imports go down the floors, and only to what imvar says it needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "imvar"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    name: floor
    for floor, names in enumerate(
        [
            ["errors"],
            ["checks", "context"],
            ["config", "memory", "noise", "outputs"],
            ["weights"],
            ["models", "schedulers", "image"],
            ["pipeline", "photos", "contact_sheet"],
            ["__init__"],
            ["cli"],
            ["__main__"],
        ]
    )
    for name in names
}
OTHERS = {"torch", "safetensors", "huggingface_hub", "PIL", "numpy", "einops"}


def imports(file: Path) -> set[str]:
    """Every name that a file imports, in full."""
    package, found = ("imvar", *file.relative_to(PACKAGE).parent.parts), set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            found |= {".".join((*above, *filter(None, [node.module]), alias.name)) for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down(file):
    unit = file.relative_to(PACKAGE).with_suffix("").parts[0]
    for module in imports(file):
        top, *inside = module.split(".")
        if top != "imvar":
            assert top in OTHERS | sys.stdlib_module_names, f"{unit} imports {module}"
        else:
            other = inside[0] if inside and inside[0] in FLOORS else "__init__"  # `from . import __version__`
            assert other == unit or FLOORS[other] < FLOORS[unit], f"{unit} imports {module}"


def test_importing_imvar_loads_no_other_library():
    """Nor does it load what huggingface_hub needs to speak to the network, or what compiles."""
    command = [sys.executable, "-c", "import imvar, sys; print(*sys.modules)"]
    loaded = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True).stdout.split()
    heavy = {
        "diffusers",
        "transformers",
        "scipy",
        "torchvision",
        "accelerate",
        "requests",
        "httpx",
        "httpx2",
        "torch._dynamo",
    }
    assert not heavy & set(loaded)
