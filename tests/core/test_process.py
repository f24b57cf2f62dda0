"""Processes of Levin on the same cores do not starve each other: only one of them lets idle threads spin."""

import os
import subprocess
import sys

import pytest

from levin.core import paths
from levin.core.process import WAIT_SETTINGS

CORES = len(os.sched_getaffinity(0))
CLAIM = """
import os, sys
from levin.core.process import share_cores
share_cores()
print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
sys.stdin.read()
"""
# Ends the process when torch is imported.
COMMAND = """
import os, runpy, sys
class End:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, End())
sys.argv = ["levin", *sys.argv[2:]]
runpy.run_module("levin." + {module!r}, run_name="__main__")
"""


@pytest.fixture
def environment(tmp_path):
    return {name: value for name, value in os.environ.items() if name not in (*WAIT_SETTINGS, "OMP_NUM_THREADS")} | {
        "TMPDIR": str(tmp_path)
    }


@pytest.fixture
def claim(environment):
    """Start a process that claims its cores and lives until its stdin is closed; return it and its setting."""
    processes = []

    def start(**changes: str) -> tuple[subprocess.Popen, str]:
        process = subprocess.Popen(
            [sys.executable, "-c", CLAIM],
            env=environment | changes,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.skipif(CORES < 2, reason="one core has nothing to share")
def test_only_the_first_process_on_the_same_cores_spins(claim):
    first, setting = claim()
    assert setting == "None"
    second, setting = claim()
    assert setting == "PASSIVE"
    second.communicate(timeout=30)
    first.kill()
    first.wait()
    assert claim()[1] == "None"  # however the first has ended


@pytest.mark.skipif(CORES < 2, reason="one core has nothing to share")
def test_a_setting_of_the_user_and_a_single_thread_stay_as_they_are(claim):
    assert claim(OMP_NUM_THREADS="1")[1] == "None"
    assert claim()[1] == "None"  # the single thread has claimed no core
    assert claim(OMP_WAIT_POLICY="ACTIVE")[1] == "ACTIVE"
    assert claim(GOMP_SPINCOUNT="100")[1] == "None"
    assert claim(OMP_NUM_THREADS="1")[1] == "None"
    assert claim(TMPDIR="/proc")[1] != "ACTIVE"  # a folder that can't be written is no error


@pytest.mark.skipif(CORES < 2, reason="one core has nothing to share")
@pytest.mark.parametrize("module", ["train", "resume", "evaluate", "play"])
def test_a_command_shares_the_cores_before_it_imports_torch(module, claim, environment, tmp_path):
    assert claim()[1] == "None"
    run = tmp_path / "run"
    run.mkdir()
    result = paths.EXPERIMENTS / "ppo_cartpole"
    for name in ("config.yaml", "policy.ckpt", "provenance.json"):
        if (result / name).exists():
            (run / name).symlink_to(result / name)
    words = {"train": ["algo=ppo"], "resume": [f"run={run}"]}.get(module, [f"run={result}"])
    answer = subprocess.run(
        [sys.executable, "-c", COMMAND.format(module=module), "-", *words],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.stdout.strip() == "PASSIVE", answer.stderr
