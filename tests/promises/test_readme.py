"""The code in the README runs, on a tiny checkpoint instead of the published one, and the paths in the pages exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/forking.md", "docs/control.md"]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
PATH = re.compile(r"`((?:imvar|scripts|tests|docs)/[\w./-]+|[a-z_]+/[\w/-]+\.\w+)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")


def test_every_block_of_code(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in BLOCKS:
        block = block.replace("lambdalabs/sd-image-variations-diffusers", str(checkpoint)).replace('"cuda"', '"cpu"')
        exec(block, names)
    assert len(list(tmp_path.glob("variation-*.png"))) == 4
    assert names["pipe"](names["photo"], num_inference_steps=1).images[0].size == (128, 128)


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
        "scripts/fork.py",
        "scripts/verify_reference.py",
        "tests/photos/LICENSES.md",
        "imvar/pipeline/image_variation.py",
        "imvar/checkpoints/imvar-emoji/README.md",
    ],
)
def test_the_readme_mentions(name):
    assert (ROOT / name).exists()
    assert Path(name).name in (ROOT / "README.md").read_text()
