"""`imvar batch` ends with the same bytes when its processes are killed; scripts/kill_batch.py does this more often."""

import random

import pytest
from kill_batch import ROWS, Bench, Round

from tests.support.crashes import mount, run_in_child

TAR = ("worker killed", "full disk")  # also with this layout, whose images are kept together until a shard ends


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("kill"), photos=3, shard=1)


@pytest.mark.parametrize(("row", "layout"), [*((row, "files") for row in ROWS), *((row, "tar") for row in TAR)])
def test_row(bench, row, layout):
    if row == "full disk" and run_in_child(lambda: None if mount(b"tmpfs", "none", "/mnt") else 1 / 0):
        pytest.skip("a tmpfs cannot be mounted here")
    with Round(bench, layout, random.Random(f"{row} {layout}")) as r:
        ROWS[row](r)
