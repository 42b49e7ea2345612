"""The code in the README and in docs/ runs, on a tiny checkpoint in place of the published one, and paths exist."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
TESTED_ELSEWHERE = ["docs/control.md", "docs/forking.md", "docs/serving.md", "docs/training.md"]
EXCERPTS = ["docs/architecture.md", "CONTRIBUTING.md"]
WITH_CODE = [
    page
    for page in PAGES
    if page not in TESTED_ELSEWHERE + EXCERPTS and "```python" in (ROOT / page).read_text(encoding="utf-8")
]
BLOCK = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)
PATH = re.compile(r"`((?:imvar|scripts|tests|docs)/[\w./-]+|[a-z_]+/[\w/-]+\.\w+)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")


@pytest.mark.parametrize("page", WITH_CODE)
def test_every_block_of_code(page, checkpoint, tmp_path, monkeypatch):
    shutil.copy(ROOT / "tests/photos/chelsea.jpg", tmp_path / "my.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in BLOCK.findall((ROOT / page).read_text()):
        block = block.replace("lambdalabs/sd-image-variations-diffusers", str(checkpoint)).replace('"cuda"', '"cpu"')
        exec(block, names)
    if page == "README.md":
        assert len(list(tmp_path.glob("variations/*.png"))) == 4
        assert names["pipe"](names["photo"], num_inference_steps=1).images[0].size == (128, 128)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_paths_and_links_exist(page):
    text = (ROOT / page).read_text()
    roots = (ROOT, ROOT / "imvar")
    missing = {name for name in PATH.findall(text) if not any((root / name).exists() for root in roots)}
    missing |= {name for name in LINK.findall(text) if not (ROOT / page).parent.joinpath(name).exists()}
    assert missing == set()


@pytest.mark.parametrize(
    "name",
    [
        "scripts/demo",
        "scripts/test",
        "scripts/verify_reference.py",
        "tests/photos/LICENSES.md",
        "imvar/checkpoints/imvar-emoji/README.md",
    ],
)
def test_the_readme_mentions(name):
    assert (ROOT / name).exists()
    assert Path(name).name in (ROOT / "README.md").read_text()
