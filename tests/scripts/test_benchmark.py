"""The benchmark of the converter measures time, memory and bytes of the process that it runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from benchmark_convert import Case, measure, prepare, table

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
WORKLOAD = "import sys, time; x = b'.' * 2**28; time.sleep(0.1); open(sys.argv[1], 'w').write('four')"


def run(tmp_path, code):
    return measure([sys.executable, "-c", code, str(tmp_path / "target")], tmp_path / "target")


def test_time_memory_and_bytes_are_those_of_the_process(tmp_path):
    result = run(tmp_path, WORKLOAD)
    assert 0.1 <= result.seconds <= result.on_disk
    assert 2**28 <= result.anon < 2**28 + 2**26
    assert (result.written, result.error) == (4, "")


def test_failures_are_reported_and_not_averaged(tmp_path):
    case = Case("diffusers", tmp_path, [])
    case.runs.extend([run(tmp_path, WORKLOAD), run(tmp_path, "raise SystemExit('cannot')")])
    assert case.error == "exit status 1: cannot"
    assert table([case]).endswith("| diffusers | - | - | - | - | - | - | exit status 1: cannot |")


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_sources_stay_as_they_are(tmp_path, cache):
    (tmp_path / "source").write_text("weights")
    prepare(tmp_path, cache)
    assert (tmp_path / "source").read_text() == "weights"
