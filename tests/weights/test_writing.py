"""Weights are written with the libraries' bytes and the memory of one tensor."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from imvar import InputError
from imvar.weights.filenames import DIFFUSERS
from imvar.weights.writing import write_tensors, write_weights
from tests.support.crashes import nano_encoder


def every_kind():
    base = torch.arange(24.0)
    kinds = ("bfloat16", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool", "float8_e4m3fn")
    return {
        "matrix": torch.randn(3, 4),
        'an "é"\n': torch.randn(2),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "turned": torch.randn(4, 5).T,
        "whole": base,
        "half": base[:12],
        "end": base[9:],
        "again": base[:12],
        "gradient": torch.nn.Parameter(torch.randn(3)),
        "expanded": torch.ones(1).expand(7),
    } | {kind: torch.ones(3).to(getattr(torch, kind)) for kind in kinds}


def test_the_bytes_that_safetensors_writes(tmp_path):
    for tensors in (every_kind(), {}, {"one": torch.ones(1)}):
        counts = []
        written = write_tensors(tmp_path / "imvar.safetensors", tensors, on_bytes=counts.append, digest=True)
        separate = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        save_file(separate, tmp_path / "library.safetensors", metadata={"format": "pt"})
        actual, expected = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("imvar", "library"))
        assert actual == expected
        assert written.path == tmp_path / "imvar.safetensors"
        assert (written.tensors, written.bytes, sum(counts)) == (len(tensors), len(actual), len(actual))
        assert written.sha256 == hashlib.sha256(actual).hexdigest()


def test_pickles_contain_only_their_tensors(tmp_path):
    written = write_tensors(tmp_path / "weights.bin", every_kind(), digest=True)
    content = (tmp_path / "weights.bin").read_bytes()
    assert (written.bytes, written.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    for name, tensor in torch.load(tmp_path / "weights.bin", weights_only=True).items():
        assert tensor.dtype == every_kind()[name].dtype
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_tensors_that_no_file_can_hold_are_refused_by_name(tmp_path):
    for ending in ("safetensors", "bin"):
        for bad, words in ((torch.ones(2, device="meta"), r"w: .*meta"), (torch.eye(2).to_sparse(), "dense")):
            with pytest.raises(InputError, match=words):
                write_tensors(tmp_path / f"bad.{ending}", {"w": bad})
    with pytest.raises(TypeError, match=r"c: .*complex64"):
        write_tensors(tmp_path / "bad.safetensors", {"c": torch.ones(1, dtype=torch.complex64)})
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_fsync")
def test_shards_are_measured_as_they_are_written(tmp_path):
    for dtype, shards in ((torch.float32, 4), (torch.float16, 2), (torch.float64, 8)):
        tensors = {f"w{i}": torch.ones(1000, dtype=dtype) for i in range(8)}
        written = write_weights(tmp_path, DIFFUSERS, tensors, max_shard_size="8KB")
        assert len(written) == shards == len(list(tmp_path.glob("*.safetensors")))
        assert sum(file.tensors for file in written) == 8
        index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 8000 * dtype.itemsize
    tensors = {f"w{i}": torch.ones(1000) for i in range(8)}
    (single,) = write_weights(tmp_path, DIFFUSERS, tensors, max_shard_size="1.5 MB")
    assert [single.path] == list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", ["10", "10 XB", "much", "-1GB", "0GB", 0, -5, True, float("nan"), 1e999, [1]])
def test_invalid_shard_sizes(tmp_path, bad):
    with pytest.raises(InputError, match="max_shard_size"):
        nano_encoder(0).save_pretrained(tmp_path / "model", max_shard_size=bad)
    assert not list(tmp_path.iterdir())


def test_memory_is_that_of_one_tensor(tmp_path):
    """The tensors have 64 MB; copies in half precision, all at once, have 32 MB."""
    tensors = {f"w{i}": torch.randn(2**19) for i in range(32)}
    halves = {name: tensor.to("meta", torch.float16) for name, tensor in tensors.items()}

    def private():
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) / 1024

    for shapes, read in ((tensors, None), (halves, lambda name: tensors[name].half())):
        most, before = 0.0, private()

        def look(_):
            nonlocal most
            most = max(most, private())

        write_tensors(tmp_path / "w.safetensors", shapes, read=read, on_bytes=look)
        assert before / 2 < most < before + 8
