"""The code in docs/control.md runs as it stands, and the script that renders its images renders each."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "control.md").read_text()


def test_every_block_of_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        names["images"] = None
        exec(block, names)
        if "images =" in block:
            assert names["images"][0].getextrema() != ((0, 0),) * 3
    assert (tmp_path / "preview.png").exists()


def test_every_image_is_rendered_by_the_script():
    import control_gallery

    images = set(re.findall(r'src="images/(.*?)\.png"', PAGE))
    assert images == set(control_gallery.GALLERIES)
    assert all((ROOT / "docs" / "images" / f"{name}.png").exists() for name in images)
