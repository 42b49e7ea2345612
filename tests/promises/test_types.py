"""Types as users get them: the code of the pages and of users is clean under mypy --strict and pyright strict.

Both check against the installed wheel.
"""

import inspect
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from imvar import StableDiffusionImageVariationPipeline
from imvar.pipeline.call_options import AnyOptions, CallOptions
from tests.support.wheel import run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GIVEN = """\
from imvar import StableDiffusionImageVariationPipeline, load_image

pipe, photo = StableDiffusionImageVariationPipeline.from_pretrained("imvar-emoji"), load_image("photo.png")
"""
FORK = "docs/forking.md"  # its code is part of scripts/fork.py, whose overrides take arguments of their own
LOOSER = "# pyright: standard, reportIncompatibleMethodOverride=false\n"
MYPY = """\
[mypy]
strict = true
[mypy-fork]
disable_error_code = override, no-untyped-call, no-any-return, unused-ignore
[mypy-peft.*]
follow_imports = skip
"""  # peft's imports would take half a minute


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """A folder with the code of every page in a file, and that of users."""
    folder = shutil.copytree(ROOT / "tests/promises/types", tmp_path_factory.mktemp("types") / "code")
    for page in PAGES:
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        if blocks and page != ROOT / FORK:
            given = [] if "from_pretrained" in blocks[0] and "import" in blocks[0] else [GIVEN]
            (folder / f"{page.stem.lower()}_page.py").write_text("\n".join([*given, *blocks]), encoding="utf-8")
    fork = (ROOT / "scripts" / "fork.py").read_text(encoding="utf-8")
    (folder / "fork.py").write_text(LOOSER + fork, encoding="utf-8")
    (folder / "mypy.ini").write_text(MYPY)
    pyright = {"typeCheckingMode": "strict", "reportUnnecessaryTypeIgnoreComment": "error"}
    (folder / "pyrightconfig.json").write_text(json.dumps(pyright))
    return folder


def test_mypy_strict(code, installed_python, tmp_path):
    options = "--python-executable", installed_python, "--cache-dir", tmp_path, "."
    run(sys.executable, "-m", "mypy", *options, cwd=code)


def test_pyright_strict(code, installed_python):
    run(sys.executable, "-m", "pyright", "--pythonpath", installed_python, cwd=code)


def test_the_options_of_the_overloads_are_those_of_the_signature():
    parameters = inspect.signature(StableDiffusionImageVariationPipeline.__call__).parameters
    annotations = {
        name: parameter.annotation for name, parameter in parameters.items() if name not in ("self", "image")
    }
    options = {name: kind.__forward_arg__ for name, kind in AnyOptions.__annotations__.items()}
    assert options == annotations
    assert CallOptions.__annotations__.keys() == options.keys() - {"output_type", "return_dict"}
