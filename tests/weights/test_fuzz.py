"""Corrupted checkpoints load completely or are refused; `scripts/fuzz` tries any number of them."""

import pytest
from fuzz.cases import file_groups, run_case, warm_up
from fuzz.corpus import write_corpus


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "checkpoints"
    write_corpus(folder)
    warm_up(folder)
    return folder, file_groups(folder)


@pytest.mark.parametrize("block", range(10))
def test_corrupted_checkpoints(checkpoints, block):
    outcomes = {}
    for number in range(200 * block, 200 * (block + 1)):
        outcome, corruption = run_case(number, 1, *checkpoints)
        assert outcome in ("loaded", "refused"), f"case {number} of seed 1, {corruption}: {outcome}"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert outcomes["refused"] > outcomes["loaded"] > 10, "the corruptions are too weak or too strong"
