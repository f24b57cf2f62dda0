"""Ways into the project say the same: containers, uv and pip, the citation, the changelog."""

import json
import re
import tomllib

import yaml

from levin.core.paths import ROOT
from levin.envs.factory import NEWEST_PYTHON

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pages():
    return "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("[!.]*.md")])


def test_the_containers_type_the_commands_of_the_documentation():
    dockerfile = (ROOT / "Dockerfile").read_text()
    makes = [*re.findall(r"RUN (make .*)", dockerfile), " ".join(json.loads(re.findall(r"CMD (.*)", dockerfile)[0]))]
    editor = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    assert (ROOT / ".devcontainer" / editor["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert len(makes) == 2
    for command in (*makes, editor["postCreateCommand"]):
        assert command in pages(), command


def test_the_container_has_a_python_that_the_package_supports():
    (version,) = re.findall(r"FROM python:3\.(\d+)", (ROOT / "Dockerfile").read_text())
    assert PROJECT["requires-python"] == f">=3.{version}"


def test_an_extra_without_packages_for_a_newer_python_is_empty_there_and_an_env_says_why():
    markers = {
        extra: {int(minor) for line in lines for minor in re.findall(r"; python_version < '3\.(\d+)'", line)}
        for extra, lines in PROJECT["optional-dependencies"].items()
    }
    newest = {extra: (3, *(minor - 1 for minor in minors)) for extra, minors in markers.items() if minors}
    assert newest == NEWEST_PYTHON


def test_the_citation_and_the_changelog_name_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert PROJECT["version"] in (ROOT / "CHANGELOG.md").read_text()
    assert f"| {PROJECT['version']} |" in (ROOT / "docs/versions.md").read_text()


def test_the_forms_are_valid():
    forms = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 3
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= set(form)
        assert all(each["type"] in ("textarea", "input") and each["attributes"]["label"] for each in form["body"])
