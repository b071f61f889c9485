"""pytest's plugin in each process of suite.py: takes the tests of its shard, writes and says at once what they came to."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from suite import append

# Errors after which every later call of the process fails: the next test needs another one.
LOST = (
    *("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address"),
    "illegal instruction",
)


def pytest_addoption(parser: Any) -> None:
    for name in ("--rows", "--shard", "--skip"):
        parser.addoption(name)


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(Shard(config), "shard")


class Shard:
    """Takes the tests of this process, and writes their rows."""

    def __init__(self, config: Any):
        self.file = Path(config.getoption("rows"))
        self.shard, self.workers = map(int, config.getoption("shard").split("/"))
        self.skip = int(config.getoption("skip"))
        self.reports: list[Any] = []

    @pytest.hookimpl(trylast=True)  # after tests/conftest.py's
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = items[self.shard :: self.workers][self.skip :]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and self.shard == self.skip == 0:  # of all processes alike
            self.say(report.nodeid, report.longreprtext)
            append(self.file, shard=-1, test=report.nodeid, outcome="failed", seconds=0.0, reason="it cannot be imported")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.reports = []
        append(self.file, shard=self.shard, test=nodeid, outcome="begun")

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.reports.append(report)
        if report.failed:
            self.say(report.nodeid, report.longreprtext)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcomes = {report.outcome: report for report in self.reports}
        outcome = next((name for name in ("failed", "skipped") if name in outcomes), "passed")
        reason = "" if outcome == "passed" else why(outcomes[outcome])
        seconds = round(sum(report.duration for report in self.reports), 3)
        append(self.file, shard=self.shard, test=nodeid, outcome=outcome, seconds=seconds, reason=reason)
        if outcome == "failed" and any(sign in outcomes[outcome].longreprtext for sign in LOST):
            os._exit(70)

    def say(self, test: str, text: str) -> None:
        sys.stderr.write(f"FAILED {test}\n{text}\n\n")
        sys.stderr.flush()


def why(report: Any) -> str:
    """The reason of a skip, or the first line of what was raised."""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else report.longreprtext).strip().partition("\n")[0]
