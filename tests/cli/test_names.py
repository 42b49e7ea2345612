"""The names of saved files: existing ones are numbered past, or replaced with --overwrite."""

import errno

import pytest
from PIL import Image

from imvar import InputError
from imvar.cli import outputs
from imvar.cli.outputs import OutputFolder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_existing_files_are_kept_and_the_new_ones_numbered(run, photo, tmp_path, capsys):
    assert run(photo, "-n", 1) == 0
    before = contents(tmp_path / "out")
    capsys.readouterr()
    assert run(photo, "-n", 2, "--guidance", 1) == 0
    after = contents(tmp_path / "out")
    new = ["a photo-0-2.png", "a photo-1.png", "contact-sheet-2.png"]
    assert sorted(after.keys() - before.keys()) == new
    assert before.items() <= after.items()
    assert all(name in line for name, line in zip(new, capsys.readouterr().out.splitlines(), strict=True))


def test_overwrite_replaces_files_and_the_sheet(run, photo, tmp_path):
    assert run(photo, "-n", 1) == 0
    before = contents(tmp_path / "out")
    assert run(photo, "-n", 1, "--guidance", 1, "--overwrite") == 0
    after = contents(tmp_path / "out")
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)


def save(folder, name, text):
    return folder.save_as(name, lambda path: path.write_text(text)).name


def test_a_number_never_gives_the_name_of_another_file_of_the_command(tmp_path):
    """As of photos fox.png and fox-0.png, with seeds 0 and 2: fox-0.png numbered is not the second's fox-0-2.png."""
    (tmp_path / "fox-0.png").write_text("kept")
    (tmp_path / "fox-0-3.png").mkdir()
    (tmp_path / "fox-0-4.png").symlink_to("nowhere")
    folder = OutputFolder(tmp_path, ["fox-0.png", "FOX-0-2.png"], False, [])
    assert save(folder, "fox-0.png", "a") == "fox-0-5.png"
    assert save(folder, "FOX-0-2.png", "b") == "FOX-0-2.png"
    assert (tmp_path / "fox-0.png").read_text() == "kept"
    assert not (tmp_path / "nowhere").exists()


def test_a_name_that_another_process_takes_in_the_meantime(tmp_path, monkeypatch):
    (tmp_path / "fox-0.png").write_text("kept")
    monkeypatch.setattr(outputs.os.path, "lexists", lambda path: False)
    assert save(OutputFolder(tmp_path, ["fox-0.png"], False, []), "fox-0.png", "new") == "fox-0-2.png"
    assert (tmp_path / "fox-0.png").read_text() == "kept"


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["numbered", "overwrite"])
def test_a_failed_save_keeps_the_existing_files(run, photo, tmp_path, capsys, monkeypatch, options):
    assert run(photo, "-n", 1) == 0
    before = contents(tmp_path / "out")

    def full(self, path, format):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert run(photo, "-n", 1, *options) == 1
    assert "png: expected a writable path, got a full disk; nothing was changed" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_a_photo_is_never_overwritten(run, photo, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    for name in ("a photo-1.png", "contact-sheet.png"):
        other = tmp_path / "out" / name
        Image.new("RGB", (32, 32), "teal").save(other)
        assert run(photo, other, "--overwrite") == 1
        assert f"{name}: expected an output file, got one of the photos" in capsys.readouterr().err
        assert Image.open(other).size == (32, 32)


def test_a_hard_link_to_a_photo_is_replaced_and_the_photo_kept(run, photo, tmp_path):
    (tmp_path / "out").mkdir()
    other = tmp_path / "out" / "a photo-0.png"
    other.hardlink_to(photo)
    before = photo.read_bytes()
    assert run(photo, "-n", 1, "--overwrite") == 0
    assert photo.read_bytes() == before
    assert Image.open(other).size == (128, 128)


def test_nothing_is_computed_if_nothing_can_be_written(run, photo, tmp_path, capsys, monkeypatch):
    (tmp_path / "out" / "contact-sheet.png").mkdir(parents=True)
    assert run(photo, "--overwrite") == 1
    assert "contact-sheet.png: expected an output file, got a folder" in capsys.readouterr().err
    monkeypatch.setattr(outputs.os, "access", lambda path, mode: path != tmp_path)
    assert run(photo, out="other/inner") == 1
    assert f"no permission to write in {tmp_path}" in capsys.readouterr().err
    assert not any(path.is_file() for path in tmp_path.rglob("*.png"))


def test_the_folder_is_checked(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"-o: expected a folder, got .*file"):
        OutputFolder(tmp_path / "file" / "inner", [], False, [])
