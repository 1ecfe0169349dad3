"""The suite's own rules: a test that needs much memory says so, or fails."""

from __future__ import annotations

import psutil
import pytest

from tests import conftest

pytest_plugins = ["pytester"]

TESTS = """
    import pytest

    def test_small(): pass

    {mark}
    def test_grows(): pass

    def test_after(): pass
"""


@pytest.mark.parametrize(
    ("mark", "counts"),
    [("", {"passed": 3, "errors": 1}), ("@pytest.mark.big(5)", {"passed": 3, "errors": 0})],
    ids=["unmarked", "big"],
)
def test_memory_bar_names_the_test_that_grew_past_it_once(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, mark: str, counts: dict[str, int]
) -> None:
    peaks = iter([conftest.MOST_GB, 4.5, 4.5])
    monkeypatch.setattr(conftest, "peak_gb", lambda: next(peaks))
    pytester.makeconftest("from tests.conftest import memory_bar")
    pytester.makepyfile(TESTS.format(mark=mark))
    result = pytester.runpytest_inprocess("-p", "no:xdist", "-p", "no:cacheprovider")
    result.assert_outcomes(**counts)
    assert next(peaks, None) is None
    if counts["errors"]:
        result.stdout.fnmatch_lines(["*ERROR at teardown of test_grows*", "its process came to 4.5 GB of 4: make it *"])


@pytest.mark.parametrize("ci", ["", "1"])
def test_big_tests_run_in_ci_alone_and_are_named_where_left_out(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str
) -> None:
    monkeypatch.setenv("CI", ci)
    pytester.makeconftest("from tests.conftest import pytest_collection_modifyitems")
    pytester.makepyfile(TESTS.format(mark="@pytest.mark.big(10)"))
    result = pytester.runpytest_inprocess("-p", "no:xdist", "-p", "no:cacheprovider", "-rs")
    result.assert_outcomes(passed=3 if ci else 2, skipped=0 if ci else 1)
    if not ci:
        result.stdout.fnmatch_lines(["SKIPPED*needs 10 GB of memory; CI=1 runs it"])


def test_peak_gb_is_no_less_than_what_the_process_holds() -> None:
    held = psutil.Process().memory_info().rss / 1e9
    assert 0.9 * held < conftest.peak_gb() < 1000
