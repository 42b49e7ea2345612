"""imvar in a terminal of 60 columns."""

import sys

import pytest

if sys.platform == "win32":
    pytest.skip("needs a pseudo-terminal", allow_module_level=True)

from tests.support.terminal import run_in_terminal

COLUMNS = 60


def bars(lines):
    """Return the progress bars among the lines that were shown."""
    return [line for line in lines if "%|" in line]


def test_help_fits(tmp_path):
    status, lines = run_in_terminal("vary", "--help", columns=COLUMNS, cwd=tmp_path)
    assert status == 0
    assert 50 <= max(map(len, lines)) <= COLUMNS


def test_the_progress_of_variations_fits(tmp_path):
    status, lines = run_in_terminal(
        *("vary", "--checkpoint", "imvar-emoji", "-n", "1", "--steps", "1", "-o", "out"), columns=COLUMNS, cwd=tmp_path
    )
    assert status == 0
    assert max(map(len, bars(lines))) <= COLUMNS
    assert len(list((tmp_path / "out").iterdir())) > 1


def test_the_progress_of_a_conversion_fits_and_has_the_time_left(tmp_path):
    status, lines = run_in_terminal("convert", "imvar-emoji", "out", columns=COLUMNS, cwd=tmp_path)
    assert status == 0
    assert max(map(len, bars(lines))) <= COLUMNS
    assert any(line.startswith("writing: ") and "<" in line for line in bars(lines))
