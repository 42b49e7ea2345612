"""`imvar info`: what it prints about records made by hand."""

import json
import shlex

import pytest
from PIL import Image

from imvar import cli
from imvar.records.files import FORMATS, save_image
from tests.support.records import hand_made

IMAGE = Image.new("RGB", (96, 64), "teal")


@pytest.fixture
def info(tmp_path, capsys, monkeypatch):
    """Return a function that writes an image with a record, and returns what `imvar info` prints about it."""
    monkeypatch.setenv("COLUMNS", "80")

    def info(record, *options, name="a.png", format="png"):
        save_image(IMAGE, tmp_path / name, record, format)
        assert cli.main(["info", str(tmp_path / name), *options]) == 0
        return capsys.readouterr().out

    return info


@pytest.mark.parametrize("format", FORMATS)
def test_it_prints_the_record_and_the_command(info, tmp_path, format):
    text = info(hand_made(), format=format)
    rows = [line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  ")]
    found = {row[0]: row[1] for row in rows if len(row) == 2}
    assert found["photo"] == "a fox, red: лиса.png"
    assert (found["seed"], found["steps"], found["guidance"], found["size"]) == ("7", "20", "3", "96 x 64")
    assert found["scheduler"] == "DDIM"
    assert found["checkpoint"] == "imvar-emoji"
    assert found["switches"] == "vae_slicing"
    assert "3 others in one batch" in text
    assert "guided steps" not in text  # a setting at its default
    command = text.splitlines()[-1]
    assert shlex.split(command)[1:] == ["again", str(tmp_path / "a.png"), "--photo", "a fox, red: лиса.png"]
    assert max(map(len, text.splitlines()[1:-1])) <= 80


def test_it_names_every_input_with_its_option(info):
    record = hand_made()
    roles = ["image", "image", "negative", "init", "mask"]
    names = ["fox.png", None, "../../etc/-dog.png", "a.safetensors", "b\nc.png"]
    record["inputs"] = [
        {"role": r, "name": n, "sha256": None, "pixels": None} for r, n in zip(roles, names, strict=True)
    ]
    record["inputs"][0]["weight"], record["inputs"][1]["weight"] = 0.7, 0.3
    text = info(record)
    assert "fox.png, weight 0.7" in text
    assert "an image without a name, weight 0.3" in text
    expected = ["--photo", "fox.png", "--photo", "PHOTO", "--negative", "./-dog.png", "--init", "a.safetensors"]
    assert shlex.split(text.splitlines()[-1])[3:] == [*expected, "--mask", "PHOTO"]


def test_inputs_without_a_name_are_named_by_their_role(info):
    record = hand_made()
    roles = ["image_embeds", "negative", "mask"]
    record["inputs"] = [{"role": role, "name": None, "sha256": None, "pixels": None} for role in roles]
    lines = " ".join(info(record).split())
    for text in "embedding an embedding without", "away from an image without", "mask a mask without":
        assert f"{text} a name" in lines
    assert "--photo EMBEDDING.safetensors --negative PHOTO --mask PHOTO" in lines


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"reasons": ["generator: one of the caller's"]}, "generator: one of the caller's"),
        ({"reasons": ["callback: a function\x1b[2J"]}, "callback: a function\\x1b[2J"),
        ({"exact": True, "reasons": [], "seed": None}, "seed: none is recorded"),
        ({"reasons": []}, "recorded as not exact, without a reason"),
        ({"exact": True, "reasons": [], "pipeline": {"lora": {}}}, "lora: it cannot be set again"),
        (
            {"inputs": [{"role": "region", "name": None, "sha256": None, "pixels": None}]},
            "region: no option takes it",
        ),
    ],
)
def test_it_says_what_cannot_be_made_again(info, changes, reason):
    text = info(hand_made(**({"exact": False} | changes)))
    assert "It cannot be made again:" in text
    assert reason in text
    assert "imvar again" not in text


def test_it_says_what_is_equal_up_to_rounding(info):
    text = info(hand_made(exact=False, reasons=["compile: kernels chosen by the clock"]))
    assert "To make it again, equal up to rounding:\n  imvar again" in text
    assert text.endswith("Not exactly, because of:\n  compile: kernels chosen by the clock\n")


def test_json_is_the_record_on_a_line(info, tmp_path):
    (line,) = info(hand_made(), "--json").splitlines()
    entry = json.loads(line)
    assert entry["record"] == hand_made()
    assert entry["path"] == str(tmp_path / "a.png")
    assert shlex.split(entry["command"])[:2] == ["imvar", "again"]


def test_a_file_without_a_record_fails_and_the_others_are_printed(info, tmp_path, capsys):
    IMAGE.save(tmp_path / "none.png")
    info(hand_made(), name="b.png")
    assert cli.main(["info", str(tmp_path / "none.png"), str(tmp_path / "b.png")]) == 1
    printed = capsys.readouterr()
    assert "none.png: expected a PNG, JPEG or WebP file with a record of imvar, got an image without one" in printed.err
    assert f"{tmp_path / 'b.png'}, an image by imvar 0.1.0" in printed.out


def test_values_of_any_type_are_printed(info):
    """A record of this form may have anything under settings."""
    record = hand_made(settings={"height": None, "guidance_scale": [3, [1]], "eta": {"a": {}}, "paste": "x" * 5000})
    record |= {
        "embedding": {"how": "x", "weights": [1, 2]},
        "flagged": True,
        "pipeline": {"freeu": {"b1": 1.5}, "fp8": True},
    }
    text = info(record)
    assert "freeu b1 1.5, fp8" in text
    assert "by the safety checker" in text
