"""A checkpoint is data: whatever it is or holds, loading it ends soon, in a model or in an error that says why."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from random_checkpoint import tiny_pipeline
from safetensors.torch import load_file, save, save_file

import imvar
from imvar import CheckpointError, InputError, StableDiffusionImageVariationPipeline
from imvar.weights.files import LARGEST_JSON
from imvar.weights.reading import read_checkpoint, read_tensors

CLASSES = {"vae": imvar.AutoencoderKL, "unet": imvar.UNet2DConditionModel,
           "image_encoder": imvar.CLIPVisionModelWithProjection, "safety_checker": imvar.StableDiffusionSafetyChecker}
PICKLE = {"vae": "diffusion_pytorch_model.bin", "unet": "diffusion_pytorch_model.bin",
          "image_encoder": "pytorch_model.bin", "safety_checker": "pytorch_model.bin"}


@pytest.fixture(scope="module")
def loaded_once(tmp_path_factory):
    """A tiny checkpoint that was loaded, so that no case is charged for what the libraries do only once."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_pipeline().save_pretrained(folder)
    StableDiffusionImageVariationPipeline.from_pretrained(folder)
    return folder


@pytest.fixture
def folder(loaded_once, tmp_path):
    return shutil.copytree(loaded_once, tmp_path / "checkpoint")


@pytest.fixture(params=CLASSES)
def part(request):
    return request.param


def refuses(load, path, words, key=None):
    """Loading raises a CheckpointError with this path, reason and key, in a second's work and 200 MB."""
    before, work, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), time.perf_counter()
    with pytest.raises(CheckpointError, match=words) as caught:
        load()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert time.process_time() - work < 1  # of its own, whatever else the machine is busy with
    assert time.perf_counter() - start < 10
    error = caught.value
    assert error.path == path
    assert str(path) in str(error)
    assert len(str(error)) < 3000
    assert key is None or error.key == key
    assert "weights_only" not in str(error)


def refuses_part(folder, part, path, words, key=None):
    """So does the part alone, and so does the pipeline."""
    refuses(lambda: CLASSES[part].from_pretrained(folder, subfolder=part), path, words, key)
    refuses(lambda: StableDiffusionImageVariationPipeline.from_pretrained(folder), path, words, key)


def weights(folder, part):
    return next((folder / part).glob("*.safetensors"))


# Files that are not what their name says

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


@pytest.mark.parametrize(("content", "words"), [
    (lambda whole: b"", "the file is empty"),
    (lambda whole: b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "a web page"),
    (lambda whole: LFS, "git lfs pull would fetch"),
    (lambda whole: whole[:-1], "cut short at"),
    (lambda whole: whole[:1000], "cut short at 1000 bytes, and its header alone has"),
    (lambda whole: whole[:9], "does not begin as one"),
    (lambda whole: (2**63).to_bytes(8, "little") + whole[8:], "does not begin as one"),
    (lambda whole: bytes(5000), "does not begin as one"),
    (lambda whole: whole + b"x", "cannot be read as a safetensors file"),
    (lambda whole: framed(b'{"a":' * 100_000), "cannot be read as JSON"),
    (lambda whole: framed(b'{"a": "\xff"}'), "cannot be read as JSON"),
    (lambda whole: framed(json.dumps({str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                                      for i in range(10**4)}).encode()), "holds 10000 tensors, more than"),
    (lambda whole: doubled_key(whole), "is there twice"),
    (lambda whole: changed(whole, data_offsets=[0, 2**62]), "cut short"),
    (lambda whole: changed(whole, data_offsets=[8, 4]), "cannot be read as a safetensors file"),
    (lambda whole: changed(whole, shape=[2**40, 2**40]), "cannot be read as a safetensors file"),
    (lambda whole: changed(whole, dtype="F7"), "cannot be read as a safetensors file"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_safetensors(folder, part, content, words):
    file = weights(folder, part)
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(content(whole))
    refuses_part(folder, part, file, words)


def framed(header, data=b""):
    return len(header).to_bytes(8, "little") + header + data


def parts_of(whole):
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:8 + length]), whole[8 + length:]


def changed(whole, **entries):
    header, data = parts_of(whole)
    header[max(header)] |= entries
    return framed(json.dumps(header).encode(), data)


def doubled_key(whole):
    header, data = parts_of(whole)
    name = json.dumps(max(header))
    twice = f'{{{name}: {{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, '
    return framed(json.dumps(header).replace("{", twice, 1).encode(), data)


@pytest.mark.parametrize("file", ["config.json", "weights"])
@pytest.mark.parametrize(("what", "words"), [
    ("folder", "is a folder"), ("pipe", "no regular file"), ("out", "leads out of"), ("device", "leads out of"),
    ("loop", "cannot be a file|leads out of|Symlink loop|cannot be read"),
])
def test_what_is_no_file_in_the_folder(folder, part, file, what, words):
    file = weights(folder, part) if file == "weights" else folder / part / file
    file.rename(folder.parent / "outside")
    if what == "folder":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to({"out": folder.parent / "outside", "device": "/dev/zero", "loop": file}[what])
    refuses_part(folder, part, file, words)


def test_a_part_that_lies_elsewhere(folder, part):
    (folder / part).rename(folder.parent / "outside")
    (folder / part).symlink_to(folder.parent / "outside")
    refuses(lambda: StableDiffusionImageVariationPipeline.from_pretrained(folder), folder / part, "leads out of")
    CLASSES[part].from_pretrained(folder, subfolder=part)  # the folder that a caller names may be a link


def test_the_cache_of_the_hub_is_made_of_links(folder, tmp_path):
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    shutil.copytree(folder, snapshot)
    blobs.mkdir()
    for number, file in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
        file.rename(blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))
    StableDiffusionImageVariationPipeline.from_pretrained(snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    StableDiffusionImageVariationPipeline.from_pretrained(tmp_path / "link")
    blob = weights(snapshot, "unet").resolve()
    blob.rename(tmp_path / "outside")
    blob.symlink_to(tmp_path / "outside")
    refuses(lambda: StableDiffusionImageVariationPipeline.from_pretrained(snapshot), weights(snapshot, "unet"),
            "leads out of")


# Pickles


class Foreign:
    def __reduce__(self):
        return os.system, ("touch must-not-be",)


class Subclass(torch.Tensor):
    pass


def rezipped(file, change):
    """Write a torch.save file again, its records changed."""
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
    return lambda file: rezipped(file, lambda records: records.pop(next(
        name for name in records if name.endswith(end))) and None)


def one():
    return {"a": torch.ones(3)}


BINS = {
    "foreign": (lambda: {"a": Foreign()}, None, r"names (posix|nt)\.system"),
    "sparse": (lambda: {"a": torch.eye(3).to_sparse()}, None, "_rebuild_sparse_tensor, and nothing but dense tensors"),
    "quantised": (lambda: {"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, None, "_qtensor"),
    "nested": (lambda: {"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, None, "nested_tensor"),
    "subclass": (lambda: {"a": torch.ones(3).as_subclass(Subclass)}, None, "_rebuild_from_type_v2|Subclass"),
    "list": (lambda: [torch.ones(3)], None, "holds a list"),
    "number": (lambda: {"a": 3}, None, "is a int, not a dense tensor"),
    "numbered": (lambda: {3: torch.ones(3)}, None, "under a int"),
    "module": (lambda: torch.nn.Linear(2, 2), None, "Linear"),
    "expanded": (lambda: {"a": torch.ones(1).expand(10**6, 10**6)}, None, r"the file holds 4 bytes of it"),
    "cut": (lambda: {"a": torch.ones(3000)}, lambda file: file.write_bytes(file.read_bytes()[:9000]), "cut short"),
    "lfs": (lambda: {}, lambda file: file.write_bytes(LFS), "git lfs pull"),
    "html": (lambda: {}, lambda file: file.write_bytes(b"<html>"), "web page"),
    "empty": (lambda: {}, lambda file: file.write_bytes(b""), "is empty"),
    "noise": (lambda: {}, lambda file: file.write_bytes(b"\xff" * 9000), "no pickle of tensors"),
    "compressed": (lambda: {"a": torch.zeros(3000)}, lambda file: rezipped(file, lambda r: zipfile.ZIP_DEFLATED),
                   "it is compressed"),
    "bomb": (one, programmed(bytes(2**25), zipfile.ZIP_DEFLATED), "compressed"),
    "long": (one, programmed(b"]" * 10**6), "more than 250000 instructions"),
    "large": (one, programmed(bytes(2**25)), "its pickle has"),
    "endless key": (one, programmed(b"\x80\x02}" + b"K\x01q\x00" + b"".join(
        b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(100)) + b"K\x01s."), "a tuple of more than"),
    "deep key": (one, programmed(b"\x80\x02}K\x01" + b"\x85" * 10**5 + b"K\x01s."), "a tuple of more than"),
    "nothing": (one, programmed(b""), "cut short, or no pickle"),
    "too short": (one, programmed(b"\x80\x02s."), "it takes more than is there"),
    "many records": (one, lambda file: rezipped(file, lambda records: records.update(
        {str(i): b"" for i in range(50_000)})), "its list of records has"),
    "other zip": (one, without("data.pkl"), "not of torch.save"),
    "no storage": (one, without("/data/0"), "cut short, or no pickle"),
}


@pytest.mark.filterwarnings("ignore:.*(quantized|nested) tensor")
@pytest.mark.parametrize("kind", BINS)
def test_pickles(folder, part, kind, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    held, spoil, words = BINS[kind]
    weights(folder, part).unlink()
    file = folder / part / PICKLE[part]
    torch.save(held(), file)
    if spoil:
        spoil(file)
    refuses_part(folder, part, file, words)
    assert not (tmp_path / "must-not-be").exists()


@pytest.mark.parametrize("old", [False, True])
def test_parameters_in_a_pickle_are_tensors(tmp_path, old):
    torch.save({"a": torch.nn.Parameter(torch.ones(3))}, tmp_path / "x.pt", _use_new_zipfile_serialization=not old)
    tensor = read_tensors(tmp_path / "x.pt")["a"]
    assert type(tensor) is torch.Tensor
    assert not tensor.requires_grad


def test_a_file_without_a_telling_name_is_what_it_begins_with(tmp_path):
    tensors = {"a": torch.arange(3.0)}
    save_file(tensors, tmp_path / "one")
    torch.save(tensors, tmp_path / "two")
    torch.save(tensors, tmp_path / "three", _use_new_zipfile_serialization=False)
    for name in ("one", "two", "three"):
        assert torch.equal(read_tensors(tmp_path / name)["a"], tensors["a"])
    (tmp_path / "four").write_bytes(b"GIF89a")
    refuses(lambda: read_tensors(tmp_path / "four"), tmp_path / "four", "neither safetensors nor of torch.save")


# Original checkpoints


@pytest.fixture
def original(tmp_path, monkeypatch):
    """What a training run of 2022 left, with the classes that it names; these are gone when it is read."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name, "__qualname__": "ModelCheckpoint"})
    with monkeypatch.context() as patch:
        for place in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, place, ModuleType(place))
        patch.setitem(sys.modules, name, module)
        held = {"epoch": 3, "global_step": 9, "pytorch-lightning_version": "1.4.2",
                "state_dict": {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.float16)},
                "callbacks": {module.ModelCheckpoint: {"best": np.float64(0.5), "mode": module.ModelCheckpoint()}},
                "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.ones(3)}}}], "lr_schedulers": []}
        torch.save(held, tmp_path / "full.ckpt")
    return tmp_path / "full.ckpt"


def test_an_original_checkpoint(original):
    tensors, aside = read_checkpoint(original)
    assert tensors["a"].tolist() == [0, 1, 2]
    assert tensors["b"].dtype == torch.float16
    assert aside == ["epoch", "global_step", "pytorch-lightning_version", "callbacks", "optimizer_states",
                     "lr_schedulers"]
    assert not [name for _, name in filter(lambda known: type(known) is tuple, torch.serialization.get_safe_globals())]
    refuses(lambda: read_tensors(original), original, "names pytorch_lightning.*ModelCheckpoint")


def test_an_original_checkpoint_without_nesting(tmp_path):
    torch.save({"a": torch.ones(3), "epoch": 3, "hparams": {"x": [1]}}, tmp_path / "x.ckpt")
    tensors, aside = read_checkpoint(tmp_path / "x.ckpt")
    assert list(tensors) == ["a"]
    assert aside == ["epoch", "hparams"]
    (tmp_path / "x.safetensors").write_bytes(save({"a": torch.ones(3)}))
    assert read_checkpoint(tmp_path / "x.safetensors")[1] == []


@pytest.mark.parametrize(("held", "words"), [
    ({"state_dict": {"a": 3}}, "a: is a int"), ({"state_dict": 3}, "holds no tensors"), ({"epoch": 3}, "no tensors"),
    ({"state_dict": {"a": torch.ones(3)}, "x": Foreign()}, r"names posix\.system"), ([], "holds a list"),
    ({"state_dict": {"a": torch.ones(3)}, "x": np.ones(3)}, r"names numpy.*_reconstruct"),
], ids=str)
def test_original_checkpoints_that_are_none(tmp_path, held, words):
    torch.save(held, tmp_path / "x.ckpt")
    refuses(lambda: read_checkpoint(tmp_path / "x.ckpt"), tmp_path / "x.ckpt", words)


def test_nothing_that_a_pickle_names_is_imported_or_made(original, tmp_path):
    """In a process of its own, where a package of that name lies in wait, and numpy's constructor."""
    package = tmp_path / "pytorch_lightning"
    (package / "callbacks").mkdir(parents=True)
    for file in (package / "__init__.py", package / "callbacks" / "__init__.py"):
        file.write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    program = ("import sys, pathlib, numpy, imvar.weights.reading as r\n"
               "made = numpy._core.multiarray.scalar\n"
               "sys.setprofile(lambda frame, event, it: event == 'c_call' and it is made and print('made'))\n"
               f"tensors, aside = r.read_checkpoint(pathlib.Path({str(original)!r}))\n"
               "print(list(tensors), 'pytorch_lightning' in sys.modules)")
    paths = os.pathsep.join([str(tmp_path), str(Path(imvar.__file__).parents[1])])
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": paths}, capture_output=True,
                          text=True, check=True)
    assert done.stdout.strip() == "['a', 'b'] False"
    assert not (tmp_path / "mark").exists()


# Settings


@pytest.mark.parametrize(("content", "words"), [
    (b"", "is empty"), (b"{", "as JSON"), (b"[]", "JSON list"), (b"\xef\xbb\xbf{}", "BOM"), (b'{"a": "\xff"}', "utf-8"),
    (b'{"a": NaN}', "NaN is not a finite number"), (b'{"a": 1e999}', "1e999 is not a finite number"),
    (b'{"a": ' + b"1" * 10**5 + b"}", "as JSON"), (b'{"a": ' * 10**5, "as JSON"),
    (b'{"a": 1, "a": 1}', "'a' is there twice"), (b" " * (LARGEST_JSON + 1), "more than"), (LFS, "git lfs pull"),
    (b'{"_use_default_values": 3}', "_use_default_values=3"),
], ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("file", ["config.json", "model_index.json"])
def test_json(folder, part, file, content, words):
    path = folder / part / file if file == "config.json" else folder / file
    path.write_bytes(content)
    if file == "config.json":
        refuses_part(folder, part, path, words)
    elif b"_use_default" not in content:
        refuses(lambda: StableDiffusionImageVariationPipeline.from_pretrained(folder), path, words)


ANY_SIZE = [10**7, 2**31, 2**62, 10**400, -1, 0, 1.5, "64", True, [], {}, None]
SIZES = {
    "unet": ["in_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim",
             "transformer_layers_per_block", "attention_head_dim"],
    "vae": ["out_channels", "layers_per_block", "norm_num_groups", "latent_channels", "sample_size"],
    "image_encoder": ["hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
                      "num_channels", "image_size", "patch_size"],
    "safety_checker": ["projection_dim"],
}


@pytest.mark.parametrize(("part", "setting", "value"), [
    *((part, name, value) for part, names in SIZES.items() for name in names for value in ANY_SIZE),
    *((part, "block_out_channels", value) for part in ("unet", "vae") for value in (
        [2**21] * 2, [2**62] * 2, [16, -32], [16, 0], [], [16] * 10**5, 16, "16", [[16]], [16, None], {"16": 32})),
    *(("unet", name, value) for name in ("down_block_types", "up_block_types") for value in (
        [], ["x"], "DownBlock2D", [3, 4], [["DownBlock2D"], None], {}, None, 3)),
    *(("unet", name, value) for name, value in (
        ("act_fn", ["silu"]), ("norm_eps", -1), ("norm_eps", "1e-5"), ("flip_sin_to_cos", "yes"), ("freq_shift", 8),
        ("sample_size", [64]), ("sample_size", -64), ("sample_size", "64"), ("time_embedding_dim", -1))),
    ("vae", "scaling_factor", 0), ("vae", "scaling_factor", "x"), ("vae", "force_upcast", "no"),
    ("image_encoder", "layer_norm_eps", -1e-5), ("image_encoder", "hidden_act", ["gelu"]),
    *(("safety_checker", "vision_config", value) for value in (
        "x", 3, [], {"hidden_size": 2**62}, {"patch_size": 2**20})),
], ids=lambda value: str(value)[:30])
def test_settings(folder, part, setting, value):
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
    key = None if value == 10**7 or isinstance(value, dict) else setting
    words = setting if key else "asks for|would do|can be|cannot be|shape"
    refuses_part(folder, part, file, words)


def test_more_layers_than_the_file_has_tensors(folder):
    for part, setting in (("unet", "layers_per_block"), ("unet", "transformer_layers_per_block"),
                          ("vae", "layers_per_block"), ("image_encoder", "num_hidden_layers")):
        file = folder / part / "config.json"
        config = json.loads(file.read_text())
        for value in (300, 999_999):
            file.write_text(json.dumps(config | {setting: value}))
            refuses_part(folder, part, file, r"asks for \d+ layers or more")
        file.write_text(json.dumps(config))


def test_numbers_of_other_libraries_are_numbers():
    config = imvar.CLIPVisionConfig(hidden_size=np.int64(24), layer_norm_eps=np.float32(0.5),
                                    num_hidden_layers=torch.tensor(3))
    assert [type(config[name]) for name in ("hidden_size", "layer_norm_eps", "num_hidden_layers")] == [int, float, int]
    with pytest.raises(InputError, match=r"CLIPVisionConfig: hidden_size='24' .* a whole number") as caught:
        imvar.CLIPVisionConfig(hidden_size="24")
    assert caught.value.key == "hidden_size"


@pytest.mark.parametrize(("setting", "value"), [
    ("num_train_timesteps", 10**6), ("num_train_timesteps", 2**62), ("num_train_timesteps", "x"), ("beta_start", []),
    ("beta_start", 10**400), ("beta_end", -1), ("beta_schedule", ["linear"]), ("trained_betas", "x"),
    ("trained_betas", [[0.1]]), ("trained_betas", [0.1]), ("trained_betas", [None]), ("steps_offset", 2**40),
    ("skip_prk_steps", "no"), ("prediction_type", None), ("_use_default_values", {"a": 1}),
], ids=lambda value: str(value)[:30])
def test_scheduler_settings(folder, setting, value):
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
    for load in (StableDiffusionImageVariationPipeline.from_pretrained,
                 lambda folder: imvar.PNDMScheduler.from_pretrained(folder, subfolder="scheduler")):
        refuses(lambda load=load: load(folder), file, setting, key=setting)


@pytest.mark.parametrize("settings", [
    {"beta_start": 0, "beta_end": 0}, {"sigma_max": "x", "use_exponential_sigmas": True},
    {"sigma_min": -1, "use_beta_sigmas": True},
], ids=str)
def test_settings_that_make_no_scheduler(tmp_path, settings):
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps(settings))
    refuses(lambda: imvar.LMSDiscreteScheduler.from_pretrained(tmp_path), file, "noise levels|sigma_")


# Indexes


@pytest.mark.parametrize(("index", "words"), [
    ({}, "no weight_map"), ({"weight_map": []}, "no weight_map"), ({"weight_map": {}}, "no weight_map"),
    ({"weight_map": {str(i): str(i) for i in range(10**4)}}, "lists 10000 tensors, more than"),
    ({"weight_map": {"a": 3}}, "no weight_map"), ({"weight_map": {"a": ["x"]}}, "no weight_map"),
    ({"weight_map": {"a": "../x.safetensors"}}, "not a file beside it"),
    ({"weight_map": {"a": "/etc/passwd"}}, "not a file beside it"),
    ({"weight_map": {"a": "x/y.safetensors"}}, "not a file beside it"),
    ({"weight_map": {"a": ".."}}, "not a file beside it"), ({"weight_map": {"a": ""}}, "not a file beside it"),
    ({"weight_map": {"a": "{self}"}}, "not a file beside it"), ({"weight_map": {"a": "\0"}}, "cannot be a file"),
    ({"weight_map": {"a": "\ud800"}}, "cannot be a file"), ({"weight_map": {"a": "x" * 1000}}, "too long"),
    ({"weight_map": {"a": "none.safetensors"}}, "no such file"),
    ({"weight_map": {"a": "part.safetensors"}}, "disagree"),
], ids=lambda value: str(value)[:40])
def test_indexes(folder, part, index, words):
    file = weights(folder, part)
    path = folder / part / f"{file.name}.index.json"
    file.rename(folder / part / "part.safetensors")
    path.write_text(json.dumps(index).replace("{self}", path.name))
    with pytest.raises(CheckpointError, match=words) as caught:
        CLASSES[part].from_pretrained(folder, subfolder=part)
    refuses_part(folder, part, caught.value.path, words)
    assert caught.value.path.parent == folder / part or "x" * 1000 in str(caught.value.path)
    held = load_file(folder / part / "part.safetensors")
    path.write_text(json.dumps({"weight_map": dict.fromkeys(held, "part.safetensors")}))  # metadata may be missing
    CLASSES[part].from_pretrained(folder, subfolder=part)


@pytest.mark.parametrize(("key", "value"), [
    ("unet", "UNet2DConditionModel"), ("unet", {"a": 1}), ("unet", 3), ("unet", True), ("unet", []),
    ("vae", [3, ["AutoencoderKL"]]), ("scheduler", ["diffusers", None]), ("scheduler", ["os", "system"]),
    ("requires_safety_checker", "yes"), ("requires_safety_checker", 1), ("requires_safety_checker", None),
    ("requires_safety_checker", [True]),
], ids=str)
def test_model_index(folder, key, value):
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {key: value}))
    refuses(lambda: StableDiffusionImageVariationPipeline.from_pretrained(folder), path, "would do|handed over", key)


def test_a_part_that_is_not_listed(folder):
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in index.items() if name != "unet"}))
    refuses(lambda: StableDiffusionImageVariationPipeline.from_pretrained(folder), path, "is not listed", key="unet")
    path.write_text(json.dumps(index | {"feature_extractor": [None, None]}))
    refuses(lambda: StableDiffusionImageVariationPipeline.from_pretrained(folder), path, "safety checker needs one")
