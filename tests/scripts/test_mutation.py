"""The mutation test finds the checks of imvar and removes them."""

from pathlib import Path

from mutation_test import ROOT, checks, detecting_tests, mutate

SOURCE = """
def f(x):
    if x < 0:
        raise invalid(InputError, "x", "a positive number", short_repr(x))
    check_tensor("x", x)
    if x:
        return None
    return check_int("x", x)
"""


def test_it_finds_checks():
    assert [line for line, _ in checks(SOURCE)] == [3, 5, 8]


def test_it_removes_one_at_a_time():
    for position in checks(SOURCE):
        assert len(checks(mutate(SOURCE, position))) == (3 if position[0] == 3 else 2)
    assert "x < 0 and False" in mutate(SOURCE, checks(SOURCE)[0])
    assert "return x" in mutate(SOURCE, checks(SOURCE)[2])


def test_it_finds_hundreds_in_imvar_and_tests_for_each():
    files = [str(path.relative_to(ROOT)) for path in (ROOT / "imvar").rglob("*.py")]
    with_checks = [file for file in files if checks((ROOT / file).read_text())]
    assert sum(len(checks((ROOT / file).read_text())) for file in files) > 300
    assert all(Path(ROOT / test).exists() for file in with_checks for test in detecting_tests(file))
