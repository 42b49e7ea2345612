"""The size of the process after memory is freed."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

import imvar

FREED = """
import torch, imvar
{setting}
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) * 1024
before = resident()
block = torch.ones(2**27)
assert resident() - before > 2**28
del block
print((resident() - before) // 2**20)
"""


def resident_after_free(setting=""):
    """Return by how many MiB a process has grown after it has freed a block of 512 MiB."""
    result = subprocess.run(
        [sys.executable, "-c", FREED.format(setting=setting)], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or not Path("/proc/self/status").exists(), reason="no glibc")
def test_freed_memory_is_kept():
    assert resident_after_free() < 100
    assert resident_after_free("assert imvar.keep_freed_memory() is True") > 400


SCATTERED = """
import torch, imvar
from imvar.malloc import return_freed_memory
{setting}
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) * 1024
torch.ones(2**22)  # after it is freed, glibc takes blocks of 16 MiB from the heap
before = resident()
blocks = [torch.ones(size) for _ in range(20) for size in (2**21, 16)]
kept = blocks[1::2]  # between the others, and at the end of the heap
del blocks
return_freed_memory()
print((resident() - before) // 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or not Path("/proc/self/status").exists(), reason="no glibc")
@pytest.mark.parametrize("setting", ["", "imvar.keep_freed_memory()"])
def test_blocks_freed_between_others_are_returned(setting):
    code = SCATTERED.format(setting=setting)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 100


def test_another_c_library(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert imvar.keep_freed_memory() is False
