"""The notebook of the lecture runs, trains a policy, and writes nothing into the checkout."""

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "lecture.ipynb"


def printed(notebook: nbformat.NotebookNode) -> str:
    """Return everything that the cells of a notebook have printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def runs() -> set[Path]:
    """Return the run folders in the checkout."""
    return {*ROOT.glob("runs/*"), *NOTEBOOK.parent.glob("runs/*")}


def check_results(text: str) -> None:
    """Check the variances and the last return that the notebook has printed."""
    variance = [float(number) for number in re.findall(r"variance +([\d.]+)", text)]
    assert len(variance) == 3
    assert variance[0] > variance[1] > variance[2] > 0, "simple, reward-to-go, baseline"
    (last_return,) = re.findall(r"last evaluation: ([\d.]+)", text)
    assert float(last_return) > 200


def test_the_notebook_runs_and_its_results_are_sensible(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = runs()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # The working directory is that of the file, as Jupyter has it.
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    check_results(printed(notebook))
    assert list(tmp_path.glob("levin-lecture-*/run/metrics.csv"))
    assert runs() == before


def test_the_stored_outputs_are_those_of_a_whole_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    check_results(printed(notebook))
    assert notebook.metadata.kernelspec.name == "python3"
    assert NOTEBOOK.stat().st_size < 400_000
