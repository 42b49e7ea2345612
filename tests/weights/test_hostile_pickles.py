"""Pickles are never executed as programs: anything but tensors is refused or replaced by a placeholder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

import imvar
from imvar.weights.reading import read_checkpoint, read_tensors
from tests.support.refusals import LFS, assert_part_refused, assert_refused, every_part, weights

PICKLE = {
    "vae": "diffusion_pytorch_model.bin",
    "unet": "diffusion_pytorch_model.bin",
    "image_encoder": "pytorch_model.bin",
    "safety_checker": "pytorch_model.bin",
}


# Pickles


class Harmful:
    def __reduce__(self):
        return os.system, ("touch must-not-be",)


class Subclass(torch.Tensor):
    pass


def rezipped(file, change):
    """Write a torch.save file again with changed records."""
    with zipfile.ZipFile(file) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    packing = change(records) or zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", packing) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def programmed(content, packing=None):
    """Write a torch.save file again with another pickle in it."""
    return lambda file: rezipped(file, lambda records: records.update({next(iter(records)): content}) or packing)


def without(end):
    """Write a torch.save file again without one record."""
    return lambda file: rezipped(
        file, lambda records: records.pop(next(name for name in records if name.endswith(end))) and None
    )


def one():
    return {"a": torch.ones(3)}


BINS = {
    "foreign": (lambda: {"a": Harmful()}, None, r"references (posix|nt)\.system"),
    "sparse": (lambda: {"a": torch.eye(3).to_sparse()}, None, "_rebuild_sparse_tensor; nothing but dense tensors"),
    "quantised": (lambda: {"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, None, "_qtensor"),
    "nested": (lambda: {"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, None, "nested_tensor"),
    "subclass": (lambda: {"a": torch.ones(3).as_subclass(Subclass)}, None, "_rebuild_from_type_v2|Subclass"),
    "list": (lambda: [torch.ones(3)], None, "expected tensors by name, got a list"),
    "number": (lambda: {"a": 3}, None, "expected a dense tensor, got a int"),
    "numbered": (lambda: {3: torch.ones(3)}, None, "got a key of type int"),
    "module": (lambda: torch.nn.Linear(2, 2), None, "Linear"),
    "expanded": (
        lambda: {"a": torch.ones(1).expand(10**6, 10**6)},
        None,
        r"expected 4000000000000 bytes for shape .*, got 4",
    ),
    "cut": (lambda: {"a": torch.ones(3000)}, lambda file: file.write_bytes(file.read_bytes()[:9000]), "cut short"),
    "lfs": (lambda: {}, lambda file: file.write_bytes(LFS), "got a git-lfs pointer; run `git lfs pull`"),
    "html": (lambda: {}, lambda file: file.write_bytes(b"<html>"), "web page"),
    "empty": (lambda: {}, lambda file: file.write_bytes(b""), "got an empty file"),
    "noise": (lambda: {}, lambda file: file.write_bytes(b"\xff" * 9000), "not a pickle of tensors"),
    "compressed": (
        lambda: {"a": torch.zeros(3000)},
        lambda file: rezipped(file, lambda r: zipfile.ZIP_DEFLATED),
        "got a compressed zip file",
    ),
    "bomb": (one, programmed(bytes(2**25), zipfile.ZIP_DEFLATED), "compressed"),
    "long": (one, programmed(b"]" * 10**6), "more than 250000 instructions"),
    "large": (one, programmed(bytes(2**25)), "expected a pickle of at most 16777216 bytes"),
    "endless key": (
        one,
        programmed(
            b"\x80\x02}" + b"K\x01q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(100)) + b"K\x01s."
        ),
        "a tuple of more than",
    ),
    "deep key": (one, programmed(b"\x80\x02}K\x01" + b"\x85" * 10**5 + b"K\x01s."), "a tuple of more than"),
    "nothing": (one, programmed(b""), "cut short or not a pickle"),
    "too short": (one, programmed(b"\x80\x02s."), "pops more values than there are"),
    "many records": (
        one,
        lambda file: rezipped(file, lambda records: records.update({str(i): b"" for i in range(50_000)})),
        "expected a zip directory of at most 2097152 bytes",
    ),
    "other zip": (one, without("data.pkl"), "not of torch.save"),
    "no storage": (one, without("/data/0"), "cut short or not a pickle"),
}


@pytest.mark.filterwarnings("ignore:.*(quantized|nested) tensor")
@pytest.mark.parametrize("kind", BINS)
@every_part
def test_pickles(folder, part, kind, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    content, corrupt, words = BINS[kind]
    weights(folder, part).unlink()
    file = folder / part / PICKLE[part]
    torch.save(content(), file)
    if corrupt:
        corrupt(file)
    assert_part_refused(folder, part, file, words)
    assert not (tmp_path / "must-not-be").exists()


@pytest.mark.parametrize("old", [False, True])
def test_parameters_in_a_pickle_are_tensors(tmp_path, old):
    torch.save({"a": torch.nn.Parameter(torch.ones(3))}, tmp_path / "x.pt", _use_new_zipfile_serialization=not old)
    tensor = read_tensors(tmp_path / "x.pt")["a"]
    assert type(tensor) is torch.Tensor
    assert not tensor.requires_grad


def test_the_first_bytes_decide_for_unknown_endings(tmp_path):
    tensors = {"a": torch.arange(3.0)}
    save_file(tensors, tmp_path / "one")
    torch.save(tensors, tmp_path / "two")
    torch.save(tensors, tmp_path / "three", _use_new_zipfile_serialization=False)
    for name in ("one", "two", "three"):
        assert torch.equal(read_tensors(tmp_path / name)["a"], tensors["a"])
    (tmp_path / "four").write_bytes(b"GIF89a")
    assert_refused(
        lambda: read_tensors(tmp_path / "four"), tmp_path / "four", "neither safetensors nor a file of torch.save"
    )


# Original checkpoints


@pytest.fixture
def original(tmp_path, monkeypatch):
    """Return the checkpoint of a training run of 2022; the classes that it references are gone."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name, "__qualname__": "ModelCheckpoint"})
    with monkeypatch.context() as patch:
        for place in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, place, ModuleType(place))
        patch.setitem(sys.modules, name, module)
        content = {
            "epoch": 3,
            "global_step": 9,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.float16)},
            "callbacks": {module.ModelCheckpoint: {"best": np.float64(0.5), "mode": module.ModelCheckpoint()}},
            "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.ones(3)}}}],
            "lr_schedulers": [],
        }
        torch.save(content, tmp_path / "full.ckpt")
    return tmp_path / "full.ckpt"


def test_an_original_checkpoint(original):
    tensors, ignored = read_checkpoint(original)
    assert tensors["a"].tolist() == [0, 1, 2]
    assert tensors["b"].dtype == torch.float16
    assert ignored == [
        "epoch",
        "global_step",
        "pytorch-lightning_version",
        "callbacks",
        "optimizer_states",
        "lr_schedulers",
    ]
    assert not [name for _, name in filter(lambda entry: type(entry) is tuple, torch.serialization.get_safe_globals())]
    assert_refused(lambda: read_tensors(original), original, "references pytorch_lightning.*ModelCheckpoint")


def test_an_original_checkpoint_without_nesting(tmp_path):
    torch.save({"a": torch.ones(3), "epoch": 3, "hparams": {"x": [1]}}, tmp_path / "x.ckpt")
    tensors, ignored = read_checkpoint(tmp_path / "x.ckpt")
    assert list(tensors) == ["a"]
    assert ignored == ["epoch", "hparams"]
    (tmp_path / "x.safetensors").write_bytes(save({"a": torch.ones(3)}))
    assert read_checkpoint(tmp_path / "x.safetensors")[1] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": {"a": 3}}, "a: expected a dense tensor, got a int"),
        ({"state_dict": 3}, "state_dict: expected tensors by name, got none"),
        ({"epoch": 3}, "state_dict: expected tensors by name, got none"),
        ({"state_dict": {"a": torch.ones(3)}, "x": Harmful()}, r"references posix\.system"),
        ([], "expected tensors by name, got a list"),
        ({"state_dict": {"a": torch.ones(3)}, "x": np.ones(3)}, r"references numpy.*_reconstruct"),
    ],
)
def test_files_that_are_not_original_checkpoints(tmp_path, content, words):
    torch.save(content, tmp_path / "x.ckpt")
    assert_refused(lambda: read_checkpoint(tmp_path / "x.ckpt"), tmp_path / "x.ckpt", words)


def test_nothing_that_a_pickle_references_is_imported_or_constructed(original, tmp_path):
    """In a separate process with an importable package of that name, and with a watch on numpy's constructor."""
    package = tmp_path / "pytorch_lightning"
    (package / "callbacks").mkdir(parents=True)
    for file in (package / "__init__.py", package / "callbacks" / "__init__.py"):
        file.write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    program = (
        "import sys, pathlib, numpy, imvar.weights.reading as r\n"
        "scalar = numpy._core.multiarray.scalar\n"
        "sys.setprofile(lambda frame, event, it: event == 'c_call' and it is scalar and print('constructed'))\n"
        f"tensors, ignored = r.read_checkpoint(pathlib.Path({str(original)!r}))\n"
        "print(list(tensors), 'pytorch_lightning' in sys.modules)"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(imvar.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "['a', 'b'] False"
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [0, 1, 4, 5])
@pytest.mark.filterwarnings("ignore:.*pickle protocol")
def test_the_protocol_of_a_whole_pickle_is_named(tmp_path, protocol, zipped):
    name = protocol if protocol > 1 else "0 or 1"
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save({"w": torch.ones(3)}, tmp_path / "a.bin", **options)
    with pytest.raises(
        imvar.CheckpointError, match=rf"a\.bin: expected a file of tensors, got a pickle of protocol {name};"
    ):
        read_tensors(tmp_path / "a.bin")
