"""Errors have one form, `name: expected X, got Y; hint`, because each is built by the helper in `imvar/errors.py`."""

import ast
import builtins
import inspect
import re
from pathlib import Path

import pytest
import torch

import imvar
from imvar import errors

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "imvar").rglob("*.py"), ROOT / "weights_convert.py"])
CLASSES = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, errors.ImvarError)}
HELPERS = {"invalid", "in_checkpoint", "at"}
FORM = re.compile(r"^\S.*: expected .+, got .+", re.DOTALL)


def called_name(node: ast.AST) -> str:
    """Return the last part of the name that is called, or an empty string."""
    func = getattr(node, "func", None)
    return getattr(func, "attr", getattr(func, "id", ""))


def is_foreign(func: ast.expr) -> bool:
    """Return whether a class is a builtin exception or one of another module, such as `argparse.ArgumentTypeError`."""
    if isinstance(func, ast.Attribute):
        return isinstance(func.value, ast.Name) and func.attr[0].isupper() and func.attr not in CLASSES
    kind = getattr(builtins, getattr(func, "id", ""), None)
    return inspect.isclass(kind) and issubclass(kind, BaseException)


def local_helpers(tree: ast.Module) -> set[str]:
    """Return the functions of a module that return only errors built by a helper."""
    helpers = set()
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        returns = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
        if returns and all(value is not None and called_name(value) in HELPERS for value in returns):
            helpers.add(function.name)
    return helpers


def misformed(tree: ast.Module) -> list[int]:
    """Return the lines that construct an imvar error directly, or raise something that no helper built."""
    helpers = HELPERS | local_helpers(tree)
    lines = [node.lineno for node in ast.walk(tree) if called_name(node) in CLASSES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if called_name(node.exc) not in helpers and not is_foreign(node.exc.func):
                lines.append(node.lineno)
        elif isinstance(node, ast.Raise) and getattr(node.exc, "id", "") in CLASSES:  # the class itself
            lines.append(node.lineno)
    return sorted(set(lines))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_errors_are_built_by_the_helper(file):
    if file.name != "errors.py":
        assert misformed(ast.parse(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise InputError('x')", [1]),
        ("raise errors.InputError('x')", [1]),
        ("raise InputError", [1]),
        ("kind = InputError\nraise kind('x')", [2]),
        ("error = CheckpointError('x')\nraise error", [1]),
        ("raise invalid(InputError, 'x', 'y', 'z')", []),
        ("def f(): return invalid(InputError, 'x', 'y', 'z')\nraise f()", []),
        ("def f(): return g()\nraise f()", [2]),
        ("try: pass\nexcept InputError as error: raise error.at(path) from error", []),
        ("try: pass\nexcept InputError as error: raise", []),
        ("raise ValueError('x')", []),
        ("raise argparse.ArgumentTypeError('x')", []),
    ],
)
def test_it_notices(code, expected):
    assert misformed(ast.parse(code)) == expected


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("num_images_per_prompt", lambda pipe, image: pipe(image, num_images_per_prompt=0)),
        ("num_inference_steps", lambda pipe, image: pipe(image, num_inference_steps="many")),
        ("height", lambda pipe, image: pipe(image, height=13)),
        ("guidance_scale", lambda pipe, image: pipe(image, guidance_scale=float("nan"))),
        ("image", lambda pipe, image: pipe(3)),
        ("image", lambda pipe, image: pipe([])),
        ("on_flagged", lambda pipe, image: pipe(image, on_flagged="hide")),
        ("generator", lambda pipe, image: pipe(image, generator="seven")),
        ("sample", lambda pipe, image: pipe.unet(None, 1, torch.zeros(1, 1, 32))),
        ("latents", lambda pipe, image: pipe(image, latents=torch.zeros(1, 4, 3, 3))),
        ("num_train_timesteps", lambda pipe, image: imvar.DDIMScheduler(num_train_timesteps=0)),
        ("dtype", lambda pipe, image: pipe.to(dtype="int8")),
    ],
)
def test_arguments(pipe, photo, name, refused):
    with pytest.raises(imvar.InputError) as caught:
        refused(pipe, photo)
    assert FORM.match(str(caught.value))
    assert str(caught.value).startswith(name)
    assert caught.value.key is not None


def test_a_checkpoint_with_a_missing_file(folder):
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(imvar.CheckpointError) as caught:
        imvar.UNet2DConditionModel.from_pretrained(folder / "unet")
    assert FORM.match(str(caught.value))
    assert str(folder) in str(caught.value)


def test_a_checkpoint_with_a_wrong_field(folder):
    file = folder / "unet" / "config.json"
    file.write_text(file.read_text().replace('"in_channels": 4', '"in_channels": "four"'))
    with pytest.raises(imvar.CheckpointError) as caught:
        imvar.UNet2DConditionModel.from_pretrained(folder / "unet")
    assert FORM.match(str(caught.value))
    assert caught.value.key == "in_channels"
