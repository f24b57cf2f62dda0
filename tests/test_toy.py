"""A new algorithm: a test adds one in a temporary folder and runs all checks on it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import checks
import rows
from levin.algorithms import sac
from levin.config.compose import compose
from levin.core import paths

ROW = """
from dataclasses import replace

import rows

ROW = replace(rows.ROWS[[row.algo for row in rows.ROWS].index("sac")], algo="toy_sac")
"""


def add_toy(folder: Path, patch: pytest.MonkeyPatch) -> rows.Row:
    """Write a copy of SAC as the new algorithm `toy_sac`, with its YAML and its row; return the row."""
    source = Path(sac.__file__).read_text().replace("class SAC(", "class ToySAC(")
    (folder / "toy_sac.py").write_text(source)
    (folder / "algo").mkdir()
    yaml = (paths.CONFIGS / "algo" / "sac.yaml").read_text().replace("levin.algorithms.sac.SAC", "toy_sac.ToySAC")
    (folder / "algo" / "toy_sac.yaml").write_text(yaml)
    (folder / "toy_row.py").write_text(ROW)
    patch.syspath_prepend(folder)
    patch.delitem(sys.modules, "toy_sac", raising=False)
    patch.delitem(sys.modules, "toy_row", raising=False)
    patch.setattr(checks, "compose", lambda overrides: compose([*overrides, f"hydra.searchpath=[{folder}]"]))
    return __import__("toy_row").ROW


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Iterator[rows.Row]:
    """Add the new algorithm once, so that its checks share `checks.plain_run`."""
    with pytest.MonkeyPatch.context() as patch:
        yield add_toy(tmp_path_factory.mktemp("toy"), patch)


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_a_new_algorithm_passes_every_check(check, toy, tmp_path):
    check(toy, tmp_path)


def test_the_checks_fail_for_a_broken_algorithm(tmp_path, monkeypatch):
    """Break the algorithm in one place per check: targets, use of `done`, optimizer steps, critic loss."""
    toy = add_toy(tmp_path, monkeypatch)
    file = tmp_path / "toy_sac.py"
    correct = file.read_text()
    broken = {
        checks.targets_follow_their_source: ("        self.update_target()\n", ""),
        checks.truncation_bootstraps_and_termination_does_not: ('"reward", "terminated")', '"reward", "done")'),
        checks.optimizers_step_and_parameters_move: ("self.step(self.critic_optimizer, critic_loss)", "pass"),
        checks.losses_equal_the_oracle: (".amin(0)", ".mean(0)"),
        checks.cadence_is_what_the_row_says: (
            "self.update_target()",
            "self.step(self.critic_optimizer, self.critic_loss(batch)[0])",
        ),
    }
    for check, (good, bad) in broken.items():
        assert good in correct
        file.write_text(correct.replace(good, bad))
        sys.modules.pop("toy_sac", None)
        folder = tmp_path / check.__name__
        with pytest.raises(AssertionError):
            check(toy, folder)
