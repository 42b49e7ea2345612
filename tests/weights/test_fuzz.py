"""Spoilt checkpoints, each loaded whole or refused; scripts/fuzz/__main__.py tries as many as one likes."""

import pytest
from fuzz.__main__ import run_case, targets, warm_up
from fuzz.corpus import make


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "checkpoints"
    make(folder)
    warm_up(folder)
    return folder, targets(folder)


@pytest.mark.parametrize("block", range(10))
def test_spoilt_checkpoints(checkpoints, block):
    outcomes = {}
    for number in range(200 * block, 200 * (block + 1)):
        outcome, done = run_case(number, 1, *checkpoints)
        assert outcome in ("loaded", "refused"), f"case {number} of seed 1, {done}: {outcome}"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert outcomes["refused"] > outcomes["loaded"] > 10, "the cases spoil too little, or too much"
