"""What becomes of freed memory, seen from outside the process."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

import imvar

FREED = """
import torch, imvar
{tell}
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) * 1024
before = resident()
block = torch.ones(2**27)
assert resident() - before > 2**28
del block
print((resident() - before) // 2**20)
"""


def left_over(tell):
    done = subprocess.run([sys.executable, "-c", FREED.format(tell=tell)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or not Path("/proc/self/status").exists(), reason="no glibc")
def test_what_is_freed_is_kept_when_asked():
    assert left_over("") < 100  # MiB, of 512
    assert left_over("assert imvar.keep_freed_memory() is True") > 400


def test_where_there_is_no_such_c_library(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert imvar.keep_freed_memory() is False
