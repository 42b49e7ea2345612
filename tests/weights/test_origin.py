"""The origin of weights: the checkpoint's name, its revision, and a digest of its files."""

import hashlib
import os
import shutil

import pytest
import torch

from imvar import AutoencoderKL, StableDiffusionImageVariationPipeline, UNet2DConditionModel
from imvar.records.digests import file_digest
from imvar.records.weights import checkpoint_of
from imvar.weights.origin import layers_of

COMMIT = "0123456789abcdef" * 2 + "01234567"


def entry_of(pipe):
    checkpoint = checkpoint_of({name: layers_of(model) for name, model in pipe.modules.items()})
    checkpoint.add_digests()
    return checkpoint.entry


def digest_of(folder, files):
    lines = "".join(f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n" for name in sorted(files))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


@pytest.fixture
def hub_cache(checkpoint, tmp_path):
    """The cache of a download, where large files have their digest as their name and others a git hash."""
    repository = tmp_path / "hub" / "models--owner--fox"
    for file in (path for path in checkpoint.rglob("*") if path.is_file()):
        large = file.suffix == ".safetensors"
        content = file.read_bytes()
        blob = repository / "blobs" / (hashlib.sha256 if large else hashlib.sha1)(content).hexdigest()
        link = repository / "snapshots" / COMMIT / file.relative_to(checkpoint)
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    for revision in ("main", "v2.0"):
        (repository / "refs" / revision).write_text(COMMIT)
    return tmp_path / "hub"


def test_a_folder(checkpoint):
    entry = entry_of(StableDiffusionImageVariationPipeline.from_pretrained(checkpoint))
    files = [str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*.safetensors")]
    assert entry == {"name": checkpoint.name, "revision": None, "weights": digest_of(checkpoint, files)}


def test_a_download_is_known_by_the_names_in_the_cache(hub_cache, checkpoint, monkeypatch):
    monkeypatch.setattr("imvar.records.weights.file_digest", lambda path: pytest.fail("read a file"))
    options = {"cache_dir": hub_cache, "local_files_only": True}
    pipe = StableDiffusionImageVariationPipeline.from_pretrained("owner/fox", revision="v2.0", **options)
    entry = entry_of(pipe)
    assert (entry["name"], entry["revision"], entry["commit"]) == ("owner/fox", "v2.0", COMMIT)
    pipe = StableDiffusionImageVariationPipeline.from_pretrained("owner/fox", **options)
    assert entry_of(pipe) == entry | {"revision": None}
    monkeypatch.undo()
    assert entry_of(StableDiffusionImageVariationPipeline.from_pretrained(checkpoint))["weights"] == entry["weights"]
    unet = UNet2DConditionModel.from_pretrained("owner/fox", subfolder="unet", revision="v2.0", **options)
    pipe.unet = unet
    assert entry_of(pipe)["revision"] == "v2.0"
    assert set(entry_of(pipe)["others"]) == {"vae", "image_encoder", "safety_checker"}


def test_shards(folder):
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="20KB")
    shards = sorted((folder / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    origin = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")._origin
    assert [file.name for file in origin.files] == [f"unet/{shard.name}" for shard in shards]


@pytest.mark.filterwarnings("ignore")
def test_one_file_with_a_moving_average(originals):
    file = originals["full"]
    entries = {
        ema: entry_of(StableDiffusionImageVariationPipeline.from_single_file(file, ema=ema, safety_checker=None))
        for ema in ("yes", "no")
    }
    assert entries["yes"] == {"name": file.name, "revision": None, "weights": entries["no"]["weights"], "ema": True}
    assert entries["no"]["ema"] is False
    line = f"{file.name} {file_digest(file)}\n"
    assert entries["yes"]["weights"] == f"sha256:{hashlib.sha256(line.encode()).hexdigest()}"


@pytest.mark.parametrize(
    ("dtypes", "is_same"),
    [
        ([torch.float64], True),
        ([torch.bfloat16], True),
        ([torch.float64, torch.bfloat16], True),
        ([torch.bfloat16, torch.float32], False),
        ([torch.bfloat16, torch.float16], False),
        ([torch.bfloat16, torch.float32, torch.bfloat16], True),
        ([torch.bfloat16, torch.float16, torch.bfloat16], False),
    ],
)
def test_weights_are_the_same_unless_they_were_rounded_twice(checkpoint, dtypes, is_same):
    vae = AutoencoderKL.from_pretrained(checkpoint, subfolder="vae")
    for dtype in dtypes:
        vae.to(dtype)
    assert vae._origin.is_of(layers_of(vae)) == is_same
