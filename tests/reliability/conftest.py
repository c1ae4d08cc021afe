"""`--reliability-table FILE` writes what the marks say was tried, and what happened in this run."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from tests.reliability.table import Row, document

_ROWS = pytest.StashKey[dict[str, Row]]()
_OPTION = "--reliability-table"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(_OPTION, type=Path, help="write docs/reliability.md, or another file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if mark := item.get_closest_marker("tried"):
            config.stash[_ROWS][item.nodeid] = Row(*mark.args)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    row = item.config.stash[_ROWS].get(item.nodeid)
    if row and (call.when == "call" or report.outcome != "passed"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        row.outcomes.add((report.outcome, str(reason).removeprefix("Skipped: ")))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if path := session.config.getoption(_OPTION, None):
        path.write_text(document(session.config.stash[_ROWS].values()), encoding="utf-8")
