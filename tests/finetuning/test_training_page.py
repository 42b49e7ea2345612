"""The commands and the code of docs/training.md run."""

import re
import shlex
import shutil
import sys

import pytest
from finetune import parse_arguments

from tests.conftest import PHOTOS
from tests.support.trainings import ROOT, finetune, write_drawings

PAGE = (ROOT / "docs/training.md").read_text().replace("\\\n", " ")
COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"scripts/finetune\.py (?=\S+ --out).*", PAGE)]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[2])
def test_options_of_the_commands(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments])
    settings, export_only = parse_arguments()
    assert str(settings.out) == arguments[2]
    assert not export_only


def test_ten_lines_from_pictures_to_variations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(PHOTOS / "chelsea.jpg", "my.jpg")
    write_drawings(tmp_path / "pictures", 4)
    first = COMMANDS[0]
    first[first.index("--steps") + 1] = "2"
    finetune([*first, "--samples", "0"])
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(code, names := {})
    assert names["pipe"].get_active_adapters() == ["default_0"]
    assert len(list(tmp_path.glob("variations/*.png"))) == 1
