"""The code that the README shows runs as it stands, on a tiny checkpoint instead of the real one."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_every_block_of_code(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in BLOCKS:
        block = block.replace("lambdalabs/sd-image-variations-diffusers", str(checkpoint)).replace('"cuda"', '"cpu"')
        exec(block, names)
    assert len(list(tmp_path.glob("variation-*.png"))) == 4
    assert names["pipe"](names["photo"], num_inference_steps=1).images[0].size == (128, 128)


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
def test_what_it_names_is_there(name):
    assert (ROOT / name).exists()
    assert Path(name).name in (ROOT / "README.md").read_text()
