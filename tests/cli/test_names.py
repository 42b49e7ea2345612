"""The names of saved files: existing ones are numbered past, replaced with --overwrite or kept with --skip-existing."""

import errno
import json
import os

import pytest
from PIL import Image

import imvar
from imvar import InputError, cli
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
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    assert save(OutputFolder(tmp_path, ["fox-0.png"], False, []), "fox-0.png", "new") == "fox-0-2.png"
    assert (tmp_path / "fox-0.png").read_text() == "kept"


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["numbered", "overwrite"])
def test_a_failed_save_keeps_the_existing_files(run, photo, tmp_path, capsys, monkeypatch, options):
    assert run(photo, "-n", 1) == 0
    before = contents(tmp_path / "out")

    def full(self, path, **_):
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


def test_a_name_that_is_too_long_is_found_before_anything_is_made(run, photo, tmp_path, capsys):
    photo.rename(tmp_path / ("x" * 251 + ".jpg"))
    assert run(tmp_path / ("x" * 251 + ".jpg"), "--checkpoint", "/no/where") == 1
    assert "-0.png: expected a shorter name, got 257 bytes; rename the photo" in capsys.readouterr().err


def test_the_folder_is_checked(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"-o: expected a folder, got .*file"):
        OutputFolder(tmp_path / "file" / "inner", [], False, [])


# ---- --skip-existing


def test_a_resumed_command_gives_the_files_of_an_uninterrupted_one(run, photo, tmp_path, capsys):
    other = tmp_path / "other.png"
    Image.linear_gradient("L").save(other)
    assert run(photo, other, "-n", 3) == 0
    out = tmp_path / "out"
    before = contents(out)
    for name in ("a photo-1.png", "other-0.png", "other-1.png", "other-2.png", "contact-sheet.png"):
        (out / name).unlink()
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert run(photo, other, "-n", 3, "--skip-existing") == 0
    assert contents(out) == before
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(", kept") for line in lines] == [True, False, True, False, False, False, False]


def test_nothing_is_made_if_everything_exists(run, photo, tmp_path, capsys, monkeypatch):
    assert run(photo, "-n", 2) == 0
    before = contents(tmp_path / "out")
    monkeypatch.setattr(imvar.UNet2DConditionModel, "forward", lambda *_, **__: pytest.fail("a step was taken"))
    capsys.readouterr()
    assert run(photo, "-n", 2, "--skip-existing", "--json") == 0
    assert contents(tmp_path / "out") == before
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["kept"]
    assert second["sheet"] == str(tmp_path / "out" / "contact-sheet.png")


def test_an_existing_image_of_another_record_is_an_error(run, photo, tmp_path, capsys, monkeypatch):
    assert run(photo, "-n", 1) == 0
    before = contents(tmp_path / "out")
    monkeypatch.setattr(imvar.UNet2DConditionModel, "forward", lambda *_, **__: pytest.fail("a step was taken"))
    assert run(photo, "-n", 1, "--skip-existing", "--guidance", 1.5) == 1
    err = capsys.readouterr().err
    assert "a photo-0.png: expected the image that this command makes, got another" in err
    assert "guidance_scale: 3.0 and 1.5; use another -o FOLDER" in err
    assert run(photo, "-n", 2, "--skip-existing") == 1
    assert "images made together (-n, --batch): 1 and 2" in capsys.readouterr().err
    Image.new("RGB", (128, 128)).save(tmp_path / "out" / "a photo-1.png")
    assert run(photo, "-n", 1, "--seed", 1, "--skip-existing") == 1
    assert "a photo-1.png: expected a PNG, JPEG or WebP file with a record of imvar" in capsys.readouterr().err
    (tmp_path / "out" / "a photo-1.png").unlink()
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("command", ["mix", "interpolate", "grid"])
def test_other_commands_are_resumed(command, checkpoint, photo, tmp_path):
    arguments = {
        "mix": [f"{photo}=0.5", "-n", "2", "--negative", photo],
        "interpolate": [photo, photo, "-n", "2"],
        "grid": [photo, "--rows", "scheduler=ddim,lms", "--columns", "steps=2,3", "--init", photo],
    }
    common = ["--checkpoint", checkpoint, "-o", tmp_path / "out", "--device", "cpu", "--dtype", "float32", "--steps", 2]
    args = [str(arg) for arg in (command, *arguments[command], *common)]
    assert cli.main(args) == 0
    before = contents(tmp_path / "out")
    for name in [name for name in before if not name.endswith(("-0.png", "-1.png"))]:
        (tmp_path / "out" / name).unlink()
    assert cli.main([*args, "--skip-existing"]) == 0
    assert contents(tmp_path / "out") == before


def test_existing_files_are_either_kept_or_replaced(capsys):
    with pytest.raises(SystemExit):
        cli.main(["vary", "a.png", "--skip-existing", "--overwrite"])
    assert "--skip-existing: expected no --overwrite with it, got both" in capsys.readouterr().err
