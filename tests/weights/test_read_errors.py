"""Errors of the system while a checkpoint is read: each is a CheckpointError with the path and the cause."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PREAMBLE = """
import errno, os, resource, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
import imvar
from imvar import StableDiffusionImageVariationPipeline as Pipeline, UNet2DConditionModel as UNet

folder = Path(sys.argv[1])
loads = [
    lambda: Pipeline.from_pretrained(folder),
    lambda: UNet.from_pretrained(folder, "unet"),
    lambda: UNet.from_single_file(folder / "unet" / "diffusion_pytorch_model.safetensors"),
]
for load in loads:
    load()  # once, for what the libraries import only then

def outcome(load):
    try:
        load()
    except imvar.CheckpointError as error:
        assert str(folder) in str(error), error
        return str(error)
    return "loaded"
"""

FAILING_CALLS = """
count, fail_at, number = 0, None, None

def hook(event, args):
    global count
    if fail_at is not None and event in ("open", "os.listdir") and str(args[0]).startswith(str(folder)):
        count += 1
        if count == fail_at + 1:
            raise OSError(number, os.strerror(number), str(args[0]))

sys.addaudithook(hook)
for load in loads:
    for numbers in (errno.EIO, errno.EACCES), (errno.ESTALE, errno.EMFILE):
        fail_at = 0
        while True:
            count, number = 0, numbers[fail_at % 2]
            result = outcome(load)
            if count <= fail_at:
                break
            assert os.strerror(number) in result, result
            fail_at += 1
        assert fail_at > 1
        print(fail_at)
"""

FAILING_STATS = """
from imvar.conversion import convert

UNet.from_pretrained(folder, "unet").save_pretrained(folder / "unet", variant="fp16")
small, target = folder / "small.safetensors", folder / "target"
convert(folder, small, to="original")
convert(folder, target, part="unet")
pipe = Pipeline.from_pretrained(folder)
parts = {name: part for name, part in pipe.components.items() if name not in ("unet", "scheduler")}
loads += [
    lambda: Pipeline.from_pretrained(folder, variant="fp16", **parts),
    lambda: UNet.from_single_file(small, config=folder),
    lambda: convert(folder, target, part="unet", dry_run=True),
    lambda: convert(small, folder / "other", dry_run=True, part="unet"),
]
count, fail_at, number = 0, None, None
stat = os.stat

def failing(path, *args, **kwargs):
    global count
    if fail_at is not None and isinstance(path, (str, os.PathLike)) and str(path).startswith(str(folder)):
        count += 1
        if count == fail_at:
            raise OSError(number, os.strerror(number), str(path))
    return stat(path, *args, **kwargs)

os.stat = failing
for load in loads[1:]:
    fail_at, refused = 0, set()
    while count >= fail_at:
        count, fail_at, number = 0, fail_at + 1, (errno.ESTALE, errno.EACCES)[fail_at // 2 % 2]
        result = outcome(load)
        assert result == "loaded" or os.strerror(number) in result, result  # "loaded": one in Path.resolve
        if result != "loaded":
            refused.add(number)
    assert len(refused) == 2
"""

TOO_MANY_FILES = """
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
used = len(os.listdir("/proc/self/fd"))
results = []
for load in loads:
    for spare in range(4):
        resource.setrlimit(resource.RLIMIT_NOFILE, (used - 1 + spare, hard))
        results.append(outcome(load))
assert all(result == "loaded" or "Too many open files" in result for result in results), results
assert any(result != "loaded" for result in results)
"""

NO_PERMISSION = """
from imvar.conversion import convert

inside, readable = folder / "unet", folder / "vae" / "config.json"
os.chmod(folder / "unet" / "config.json", 0)
os.setuid(65534)
for load in loads[:2]:
    assert "Permission denied" in outcome(load), outcome(load)
os.stat(readable)
for path in (Path(sys.argv[2]) / "behind", Path(sys.argv[2]) / "behind" / "model.safetensors"):
    for load in (Pipeline.from_pretrained, Pipeline.from_single_file):
        try:
            load(path)
        except imvar.CheckpointError as error:
            assert "Permission denied" in str(error) and "no such" not in str(error), error
        else:
            raise AssertionError("loaded")
folder = Path(sys.argv[3])
for load in (
    *loads,
    lambda: Pipeline.from_pretrained(folder, variant="fp16"),
    lambda: convert(folder, Path(sys.argv[2]), dry_run=True),
    lambda: convert(folder, folder / "unet" / "target", dry_run=True),
):
    assert "Permission denied" in outcome(load), outcome(load)
"""

LITTLE_MEMORY = """
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
results = []
for extra in (0, 2**18, 2**20):
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, -1))
    results.append(outcome(lambda: UNet.from_pretrained(folder, "unet", dtype=torch.float64, disable_mmap=True)))
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert any("enough memory" in result for result in results), results
assert outcome(loads[1]) == "loaded"
"""


PROGRAMS = {"calls": FAILING_CALLS, "stats": FAILING_STATS, "files": TOO_MANY_FILES, "memory": LITTLE_MEMORY}


def run(program, *args):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + program, *map(str, args)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_an_error_of_the_system_has_path_and_cause(folder, program):
    result = run(program, folder)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to become another user")
def test_a_file_without_permission_is_not_called_absent(folder):
    with tempfile.TemporaryDirectory() as place:  # not below tmp_path, which is closed to other users
        os.chmod(place, 0o755)
        copy, hidden, closed = Path(place) / "checkpoint", Path(place) / "hidden", Path(place) / "closed"
        for copied in (copy, closed):
            shutil.copytree(folder, copied)
            for path in (copied, *copied.rglob("*")):
                os.chmod(path, 0o755 if path.is_dir() else 0o644)
        os.chmod(closed / "unet", 0)
        hidden.mkdir(mode=0o700)
        (hidden / "behind").mkdir()
        result = run(NO_PERMISSION, copy, hidden, closed)
    assert result.returncode == 0, result.stderr[-3000:]
