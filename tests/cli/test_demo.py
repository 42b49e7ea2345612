"""`imvar demo`: the bundled drawings, or the photos of a checkout."""

from pathlib import Path

import pytest

from imvar import bundled_examples, cli

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_drawings_that_come_with_imvar():
    assert cli.main(["demo", "-n", "1", "--steps", "1", "--device", "cpu"]) == 0
    expected = {"contact-sheet.png", *(f"{name}-0.png" for name in bundled_examples())}
    assert {path.name for path in Path("out/demo").iterdir()} == expected


def test_another_checkpoint_varies_the_photos_of_a_checkout(checkpoint, capsys):
    demo = ["demo", "--checkpoint", str(checkpoint), "-n", "1", "--steps", "1", "--device", "cpu", "--dtype", "float32"]
    with pytest.raises(SystemExit):
        cli.main(demo)
    assert "--checkpoint: expected imvar-emoji where there is no tests/photos" in capsys.readouterr().err
    Path("tests").symlink_to(ROOT / "tests")
    assert cli.main([*demo, "-o", "mine"]) == 0
    expected = {"contact-sheet.png", "chelsea-0.png", "coffee-0.png", "rocket-0.png"}
    assert {path.name for path in Path("mine").iterdir()} == expected
