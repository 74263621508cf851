"""The table of Python and torch versions that ``nox -s tests`` fills, one run at a time."""

from __future__ import annotations

import json
import platform

import pytest
import torch

from benchmarks import matrix

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.unit.test_a" name="test_passes" time="1.5"/>
<testcase classname="tests.unit.test_a" name="test_is_skipped" time="0.1"><skipped message="no GPU"/></testcase>
{more}
</testsuite></testsuites>"""
FAILURE = '<testcase classname="tests.unit.test_a" name="test_fails" time="0.4"><failure message="1 != 2"/></testcase>'


@pytest.fixture
def junit(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT.format(more=""))
    return path


@pytest.fixture
def table(tmp_path):
    return tmp_path / "matrix.json"


def cells(table):
    return json.loads(table.read_text())["cells"]


def test_a_run_becomes_a_row_with_its_versions_and_outcomes(junit, table):
    assert matrix.main([str(junit), str(table), "--", "tests/unit", "-q"]) == 0
    [row] = cells(table)
    assert row["python"] == platform.python_version()
    assert row["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert row["command"] == "pytest tests/unit -q"
    assert (row["outcomes"], row["failed"], row["seconds"]) == ({"passed": 1, "skipped": 1}, [], 1.6)


def test_a_failure_is_named_and_is_the_exit_code(junit, table):
    junit.write_text(JUNIT.format(more=FAILURE))
    assert matrix.main([str(junit), str(table)]) == 1
    [row] = cells(table)
    assert row["failed"] == ["tests.unit.test_a::test_fails"]
    assert row["outcomes"]["failure"] == 1


def test_a_later_run_replaces_the_row_of_its_versions_and_no_other(junit, table):
    matrix.main([str(junit), str(table)])
    [row] = cells(table)
    older, newer = {**row, "torch": "1.0.0"}, {**row, "torch": "99.0.0+cpu"}
    table.write_text(json.dumps({"cells": [newer, row, older]}))
    junit.write_text(JUNIT.format(more=FAILURE))
    matrix.main([str(junit), str(table)])
    assert [found["torch"] for found in cells(table)] == ["1.0.0", row["torch"], "99.0.0+cpu"]
    assert [len(found["failed"]) for found in cells(table)] == [0, 1, 0]
