"""keep_freed_memory: the size of the process after a large block is freed."""

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


def test_another_c_library(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert imvar.keep_freed_memory() is False
