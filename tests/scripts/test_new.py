"""A project made from the template: its own tests pass, the old name is gone, and a later template merges."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]  # without an import of the package: this file keeps the name of the template
if not (ROOT / "src" / "levin").is_dir():
    pytest.skip("a project made from the template makes no further one", allow_module_level=True)

IDENTITY = {f"GIT_{who}_{what}": "test@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
TESTS = ("tests/test_architecture.py", "tests/config/test_config.py", "tests/data/test_returns.py")


def run(folder, *command, ok=True, **environment):
    answer = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, **IDENTITY, **environment}
    )
    assert not ok or answer.returncode == 0, answer.stdout + answer.stderr
    return answer


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Return a repository with the files of this checkout as its only commit."""
    folder = tmp_path_factory.mktemp("upstream") / "template"
    folder.mkdir()
    for name in run(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard").stdout.splitlines():
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    run(folder, "git", "init", "--quiet", "--initial-branch", "main")
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", "Template")
    return folder


@pytest.fixture(scope="module")
def project(template, tmp_path_factory):
    """Return a clone of the template that has become the project `my_lab`."""
    folder = tmp_path_factory.mktemp("own") / "project"
    run(folder.parent, "git", "clone", "--quiet", "--origin", "upstream", str(template), str(folder))
    run(folder, sys.executable, "scripts/new.py", "--name", "my_lab")
    return folder


def test_its_own_tests_pass(project, tmp_path):
    facts = tmp_path / "my_lab-0.1.0.dist-info"  # as `make setup` would install it
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: my_lab\nVersion: 0.1.0\n")
    path = os.pathsep.join([str(project / "src"), str(tmp_path)])
    options = ("-q", "-n", "0", "-p", "no:cacheprovider", "-k", "not drill")  # the drill runs without PYTHONPATH
    run(project, sys.executable, "-m", "pytest", *options, *TESTS, PYTHONPATH=path)
    run(project, sys.executable, "-m", "my_lab.report", "check=true", PYTHONPATH=path)


def test_the_name_of_the_template_is_gone(project):
    left = run(project, "git", "grep", "--ignore-case", "--files-with-matches", "levin", ok=False).stdout.split()
    # The license says whose the template is, and a stored policy names the env of its template in its bytes.
    assert set(left) == {
        "LICENSE",
        "scripts/new.py",
        "tests/scripts/test_new.py",
        "experiments/world_models_dodge/policy.ckpt",
    }
    assert (project / "src/my_lab/train.py").exists()
    assert not (project / "src/levin").exists()
    assert "wandb_project: my_lab" in (project / "configs/train.yaml").read_text()
    assert (project / "README.md").read_text().startswith("# my_lab\n")
    run(project, sys.executable, "-m", "ruff", "check")
    run(project, sys.executable, "-m", "ruff", "format", "--check")


def test_diffs_in_the_pages_apply_in_a_project_with_a_longer_name():
    """A line with the name that gets longer than 120 characters is wrapped, so that a diff with it does not apply."""
    for page in (ROOT / "docs").rglob("[!.]*.md"):
        for diff in re.findall(r"^```diff\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            named = [line[1:] for line in diff.splitlines() if "levin" in line and line[0] in " -"]
            assert all(len(line) + 8 <= 120 for line in named), f"{page}: leave out {max(named, key=len)}"


def test_a_later_template_merges(project, template):
    own = project / "src/my_lab/algorithms/sac.py"
    own.write_text(own.read_text().replace("tau: Fraction = 0.005", "tau: Fraction = 0.01"))
    run(project, "git", "commit", "--quiet", "--all", "--message", "My value of tau")
    source = template / "src/levin/algorithms/sac.py"
    source.write_text(source.read_text() + "\n\nNEWER = True\n")
    (template / "src/levin/core/newer.py").write_text(
        '"""A new file."""\n\nfrom levin.core import files\n\nFILES = files\n'
    )
    run(template, "git", "add", "--all")
    run(template, "git", "commit", "--quiet", "--message", "A later template")
    run(project, "git", "fetch", "--quiet", "upstream")
    run(project, sys.executable, "scripts/new.py", "--base", "upstream/main")
    assert "NEWER = True" in own.read_text()
    assert "tau: Fraction = 0.01" in own.read_text()
    assert "from my_lab.core import files" in (project / "src/my_lab/core/newer.py").read_text()
    assert not (project / "src/levin").exists()
    assert run(project, "git", "status", "--porcelain").stdout == ""


def test_a_second_clone_takes_the_branch_of_the_template_from_the_first(project, tmp_path):
    shared, second = tmp_path / "shared.git", tmp_path / "second"
    run(tmp_path, "git", "init", "--quiet", "--bare", str(shared))
    run(project, "git", "push", "--quiet", str(shared), "main")
    run(tmp_path, "git", "clone", "--quiet", "--branch", "main", str(shared), str(second))
    (second / "src/own_envs").mkdir()  # another package beside that of the project
    (second / "src/own_envs/__init__.py").touch()
    answer = run(second, sys.executable, "scripts/new.py", "--base", "main", ok=False)
    assert "there is no branch template" in answer.stderr
    run(project, "git", "push", "--quiet", str(shared), "template")
    run(second, "git", "fetch", "--quiet", "origin")
    run(second, sys.executable, "scripts/new.py", "--base", "nowhere", ok=False)
    assert run(second, "git", "rev-parse", "template").stdout == run(project, "git", "rev-parse", "template").stdout


def test_without_a_name_for_commits_nothing_is_renamed(template, tmp_path):
    folder = tmp_path / "project"
    run(tmp_path, "git", "clone", "--quiet", str(template), str(folder))
    nobody = dict.fromkeys(IDENTITY, "")
    answer = run(folder, sys.executable, "scripts/new.py", "--name", "my_lab", ok=False, **nobody)
    assert answer.returncode == 1
    assert "make new: git var" in answer.stderr
    assert run(folder, "git", "status", "--porcelain").stdout == ""


def test_if_the_commit_fails_nothing_is_renamed(template, tmp_path):
    """Such as without the key that signs commits, or by a hook."""
    folder = tmp_path / "project"
    run(tmp_path, "git", "clone", "--quiet", str(template), str(folder))
    ignored = folder / "src/levin/__pycache__/train.pyc"
    ignored.parent.mkdir()
    ignored.write_text("as if it had been used")
    hook = folder / ".git/hooks/pre-commit"
    hook.write_text("#!/bin/sh\necho not today >&2\nexit 1\n")
    hook.chmod(0o755)
    path = str(folder / "src")  # as it is installed
    answer = run(folder, sys.executable, "scripts/new.py", "--name", "my_lab", ok=False, PYTHONPATH=path)
    assert "not today" in answer.stderr
    assert run(folder, "git", "status", "--porcelain").stdout == ""
    assert ignored.exists()
    hook.unlink()
    run(folder, sys.executable, "scripts/new.py", "--name", "my_lab", PYTHONPATH=path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--name", "My-Lab"), "small letters"),
        (("--name", "torch"), "another package"),
        (("--name", "numpy"), "another package"),
        (("--name", "hydra"), "another package"),  # its package on PyPI is hydra-core
        (("--name", "ray"), "another package"),  # of an extra that may not be installed
        (("--name", "other"), "called my_lab already"),
        (("--base", "nowhere"), "nowhere"),
        (("--name", ""), "small letters"),
    ],
)
def test_bad_input_is_a_sentence(project, arguments, message):
    answer = run(project, sys.executable, "scripts/new.py", *arguments, ok=False)
    assert answer.returncode == 1
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr


def test_changes_that_are_not_committed_are_kept(template, tmp_path):
    folder = tmp_path / "project"
    run(tmp_path, "git", "clone", "--quiet", str(template), str(folder))
    (folder / "README.md").write_text("# Mine\n")
    answer = run(folder, sys.executable, "scripts/new.py", "--name", "my_lab", ok=False)
    assert "not committed" in answer.stderr
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert (folder / "src/levin").exists()
    run(folder, "git", "checkout", "--quiet", "README.md")
    (folder / "experiments/my_idea").mkdir()
    fork = folder / "experiments/my_idea/algorithm.py"  # as `make fork` writes it
    fork.write_text("from levin.algorithms.base import Algorithm\n")
    answer = run(folder, sys.executable, "scripts/new.py", "--name", "my_lab", ok=False)
    assert "not committed" in answer.stderr
    assert "?? experiments/my_idea/" in answer.stderr
    assert (folder / "src/levin").exists()
