"""Imports go only downward, floor by floor, and only to the libraries that imvar depends on."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import imvar

PACKAGE = Path(__file__).parents[2] / "imvar"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    name: floor
    for floor, names in enumerate(
        [
            ["choices", "limits", "text", "version"],
            ["errors"],
            ["checks"],
            ["config", "fork_safety", "oom", "malloc", "noise", "outputs", "sources"],
            ["atomic"],
            ["photos"],
            ["weights"],
            ["kernels"],
            ["models"],
            ["schedulers", "image", "runtime"],
            ["records"],
            ["embeddings"],
            ["conversion", "pipeline"],
            ["contact_sheet", "loading"],
            ["__init__"],
            ["batch"],
            ["cli"],
            ["__main__"],
        ]
    )
    for name in names
}
DEPENDENCIES = {"torch", "safetensors", "huggingface_hub", "PIL", "numpy", "einops"}
TYPES_ONLY = {"typing_extensions"}  # whose types every type checker has
EXTRAS = {
    "cli": {"shtab", "fastapi", "gradio", "uvicorn"},
    "batch": {"fsspec", "pyarrow", "ray"},
}  # imported where they are used, and said how to get
MODULES = {".".join(("imvar", *file.relative_to(PACKAGE).with_suffix("").parts)) for file in FILES}


def imported_names(file: Path) -> set[str]:
    """Return every name that a file imports, in full, at the top or within a function."""
    package, names = ("imvar", *file.relative_to(PACKAGE).parent.parts), set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) + 1 - node.level] if node.level else ()
            names |= {".".join((*parent, *filter(None, [node.module]), alias.name)) for alias in node.names}
    return names


def module_globals_written(file: Path) -> list[str]:
    """Return the attributes of imported imvar modules that a file assigns to, with the line."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    modules = {name.rpartition(".")[2] for name in imported_names(file) if name in MODULES}
    return [
        f"{node.value.id}.{node.attr}, line {node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id in modules
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down(file):
    unit = file.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imported_names(file):
        top, *inside = name.split(".")
        if top != "imvar":
            allowed = DEPENDENCIES | TYPES_ONLY | EXTRAS.get(unit, set()) | sys.stdlib_module_names
            assert top in allowed, f"{unit} imports {name}"
        else:
            other = inside[0] if inside and inside[0] in FLOORS else "__init__"  # `from . import __version__`
            assert other == unit or FLOORS[other] < FLOORS[unit], f"{unit} imports {name}"


def test_every_module_has_a_floor():
    assert {file.relative_to(PACKAGE).with_suffix("").parts[0] for file in FILES} == FLOORS.keys()


def test_only_ops_imports_kernels_into_models():
    """Networks reach the kernels through `models/ops.py`, so the other files read like a paper's code."""
    importers = {
        file.name
        for file in (PACKAGE / "models").glob("*.py")
        if any(name.startswith("imvar.kernels") for name in imported_names(file))
    }
    assert importers == {"ops.py"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_module_writes_into_another(file):
    assert not module_globals_written(file)


def loaded_by(code: str) -> set[str]:
    """Return the modules that a process has loaded after it ran `code`."""
    command = [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"]
    return set(subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True).stdout.split())


def test_importing_imvar_loads_no_library():
    assert not DEPENDENCIES & loaded_by("import imvar")


def test_all_of_imvar_loads_no_other_library():
    """Neither the network libraries of huggingface_hub nor torch's compiler."""
    loaded = loaded_by("from imvar import *")
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
        "pyarrow",
        "imvar.batch",
    }
    assert loaded >= DEPENDENCIES
    assert not heavy & loaded


def test_public_names_are_listed_alike():
    """For type checkers as imports, for `from imvar import *` in `__all__`, and at run time by module."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imported = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imported == imvar.MODULE_OF
    assert sorted(imported) == sorted(imvar.__all__)
    assert set(imvar.__all__) <= set(dir(imvar))


@pytest.mark.parametrize("name", imvar.__all__)
def test_each_public_name_is_found(name):
    assert getattr(imvar, name) is getattr(importlib.import_module(f"imvar.{imvar.MODULE_OF[name]}"), name)


@pytest.mark.parametrize("name", imvar.SUBMODULES)
def test_modules_are_attributes_without_an_import(name):
    assert getattr(imvar, name) is sys.modules[f"imvar.{name}"]


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'imvar' has no attribute 'StableDiffusionPipeline'"):
        _ = imvar.StableDiffusionPipeline
    with pytest.raises(ImportError, match="cannot import name 'StableDiffusionPipeline' from 'imvar'"):
        from imvar import StableDiffusionPipeline  # noqa: F401


def test_a_converter_alone_has_the_classes_of_all_parts():
    check = "assert all(PARTS.values()) and len(PARTS['scheduler']) == 7"
    assert loaded_by(f"import imvar.conversion; from imvar.weights.model_index import PARTS; {check}")
