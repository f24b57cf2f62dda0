"""Runs every check of checks.py for every row of rows.py."""

import pytest

import checks
import rows
from levin.core import paths


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("row", rows.ROWS, ids=lambda row: row.algo)  # the outer loop: the checks of a row share a run
def test_row(check, row, tmp_path):
    check(row, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", rows.ROWS, ids=lambda row: row.algo)
def test_inductor_and_eager_are_the_same(row, tmp_path):
    checks.compiled_and_eager_are_the_same(row, tmp_path, backend="inductor")


def test_every_algorithm_has_a_row_a_yaml_and_a_file():
    files = {file.stem for file in (paths.ROOT / "src/levin/algorithms").glob("*.py")} - {"__init__", "base"}
    yamls = {file.stem for file in (paths.CONFIGS / "algo").glob("*.yaml")}
    assert (
        {file for file in files if not file.endswith(("_networks", "_evolution"))}
        == yamls
        == {row.algo for row in rows.ROWS}
    )
