"""`imvar batch` ends with the same bytes when its processes are killed; scripts/kill_batch.py does this more often."""

import random
import shutil
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("finds processes in /proc", allow_module_level=True)

from kill_batch import ROWS, Bench, Round

from imvar import batch
from imvar.batch.finish import bytes_needed
from imvar.batch.store import Store
from tests.support.crashes import mount, run_in_child

OF_KEPT = [("full disk", "tar"), ("worker killed", "parquet")]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("kill"), photos=3, shard=1)


@pytest.mark.parametrize(("row", "layout"), [*((row, "files") for row in ROWS), *OF_KEPT])
def test_row(bench, row, layout):
    if row == "full disk" and run_in_child(lambda: None if mount(b"tmpfs", "none", "/mnt") else 1 / 0):
        pytest.skip("a tmpfs cannot be mounted here")
    with Round(bench, layout, random.Random(f"{row} {layout}")) as r:
        ROWS[row](r)


@pytest.mark.parametrize("layout", ["files", "tar"])
def test_bytes_needed(bench, layout):
    """What the message of a full disk says is missing: about the size of the images that are not made yet."""
    with Round(bench, layout, random.Random(0)) as r:
        r.copy_quiet()
        store, plan = Store(r.out), batch.open_plan(r.out)
        assert bytes_needed(store, plan) == 0
        number, size = next((number, store.marker(number).bytes) for number in range(3) if store.marker(number).made)
        store.reopen(number)
        if layout == "files":
            assert bytes_needed(store, plan) < 0.5 * size  # its images take that room already
            shutil.rmtree(store.path("images", number))
        assert 0.5 * size < bytes_needed(store, plan) < 2 * size
        for number in range(3):
            store.reopen(number)
        shutil.rmtree(r.out / "images", ignore_errors=True)
        assert bytes_needed(store, plan) is None
